"""docs/adding_methods.md: its methods run, in one file of 25 lines each."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.hosts import HOSTS
from tests.decoder.models import config, decoder, params_of, tokens
from tokjax import recipes
from tokjax.models import Generator
from tokjax.recipes import registry
from tokjax.tokens import Kind

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOC = ROOT / "docs/adding_methods.md"
NAMES = {
  "vision": "long_values",
  "short cache": "last_row",
  "cache": "long_value_cache",
  "both": "seen_by_last",
}


def block(name: str) -> str:
  found = re.search(
    rf"<!-- {name} -->\n```python\n(.*?)```\n<!-- end -->", DOC.read_text(),
    re.DOTALL,
  )  # fmt: skip
  assert found, f"{DOC.name} has no block {name!r}"
  return found.group(1)


@pytest.fixture
def slots(request):
  """What the method of the document returns; it is not left registered."""
  exec(compile(block(request.param), DOC.name, "exec"), {"__name__": "mine"})
  name = NAMES[request.param]
  yield recipes.get(name)
  del registry._RECIPES[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_at_most_25_lines(name):
  assert len(block(name).splitlines()) <= 25


@pytest.mark.parametrize("slots", ["vision"], indirect=True)
def test_the_vision_method_keeps_the_longest_values(slots):
  host = HOSTS[0]
  model = host.build(slots.with_keep(0.5))
  params = host.params(model)
  _, out = jax.jit(model.apply)({"params": params}, host.images(2))
  assert out["tokens"].num_tokens == host.protected + 32


def generated(slots, kinds=None):
  cfg = config(depth=4)
  made = Generator(
    decoder(slots, depth=4), params_of(cfg), capacity=24, decode=4,
    buckets=(8, 16, 24),
  )  # fmt: skip
  prompts = [tokens(1, n, seed=n)[0].tolist() for n in (24, 17)]
  return made, made.prefill(prompts, kinds)


def test_cache_methods_are_held_to_the_laws(tmp_path):
  """One has a reference in a file of the user, the other has none."""
  both = block("short cache") + block("cache")
  (tmp_path / "my_recipes.py").write_text(both)
  (tmp_path / "my_recipes_reference.py").write_text(block("reference"))
  path = os.pathsep.join([str(tmp_path), str(ROOT)])
  own = {"TOKJAX_RECIPES": "my_recipes", "PYTHONPATH": path}
  few = "equal_the_reference or prompt_or_refused"
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "tests/cache/test_contract.py", "-v",
     "-n", "0", "-p", "no:cacheprovider",
     "-k", f"(last_row or long_value_cache) and ({few})"],
    cwd=ROOT, env={**os.environ, **own}, text=True, capture_output=True,
    check=False,
  )  # fmt: skip
  shown = done.stdout
  assert done.returncode == 0, shown[-3000:] + done.stderr[-3000:]
  assert re.search(r"reference_one_by_one\[last_row\] PASSED", shown)
  assert re.search(r"or_refused\[last_row\] PASSED", shown)
  assert re.search(r"or_refused\[long_value_cache\] PASSED", shown)
  assert re.search(
    r"SKIPPED .*write my_recipes_reference.py .* long_value_cache\(s\)", shown
  )


@pytest.mark.parametrize("slots", ["short cache", "cache"], indirect=True)
def test_the_cache_method_holds_half(slots):
  made, going = generated(slots)
  assert made.bytes(going).physical < 0.8 * _full_bytes()
  steps = list(made.stream(going))
  assert len(steps) == 4


def _full_bytes():
  made, going = generated(recipes.get("full"))
  return made.bytes(going).physical


@pytest.mark.parametrize("slots", ["both"], indirect=True)
def test_the_method_that_does_both_does_both(slots):
  kinds = [
    [Kind.TEXT] * 4 + [Kind.VISUAL] * n + [Kind.TEXT] * (20 - n)
    for n in (16, 16)
  ]
  kinds[1] = kinds[1][:17]
  made, going = generated(slots, kinds)
  sizes = [sum(x.size for x in jax.tree.leaves(s)) for s in going.states]
  # Blocks from the middle on are given fewer tokens.
  assert sizes[2] < sizes[1] == sizes[0]
  assert made.bytes(going).physical < 0.8 * _full_bytes()
  assert np.isfinite(going.logits).all()
  assert len(list(made.stream(going))) == 4


@pytest.mark.parametrize("slots", ["vision"], indirect=True)
def test_the_method_joins_others(slots):
  model = HOSTS[0].build(recipes.get("evit+long_values", keep=0.5))
  shape = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  jax.eval_shape(lambda x: model.init(jax.random.key(0), x), shape)
