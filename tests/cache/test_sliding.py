"""Sliding layers hold their window, whatever the recipe."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache import cases
from tests.cache.cases import GROUPS, HEADS, LENGTHS, STEPS, Case, case
from tests.cache.reference.layer_input import (
  GROUP,
  SCALE,
  best,
  half,
  layer_input,
  rope,
  softmax,
)
from tests.cache.test_forms import ALL
from tokjax import budgets, recipes
from tokjax.attention.block_memory import BlockMemory
from tokjax.cache.adaptive import Adaptive
from tokjax.cache.combine import ByHead
from tokjax.cache.entries import physical_bytes
from tokjax.cache.kivi import Kivi
from tokjax.cache.kv import KV
from tokjax.cache.limits import Limits
from tokjax.cache.mixed import Mixed
from tokjax.cache.persistent import Persistent
from tokjax.cache.reads import Pages
from tokjax.cache.retriever import Retriever
from tokjax.cache.scores import key_norm
from tokjax.cache.stores import Exact
from tokjax.layer import Layer
from tokjax.slots import Slots

# Shorter than all prompts and decoded tokens, and longer than the last of both.
WINDOWS = (5, 12)
FINE = {"rtol": 1e-5, "atol": 1e-5}
ROUGH = {"rtol": 0.1, "atol": 0.1}

# Recipes with room for all that is in sight: they give what the full cache
# gives, those with few bits about that.
KNORM = recipes.get("knorm", keep=1.0).cache
HOLDING_ALL = {
  "knorm": KNORM,
  "h2o": recipes.get("h2o", heavy=ALL, recent=ALL).cache,
  "reindexed": KV(store=Exact(rotated=False, reindexed=True)),
  "adakv": Adaptive(key_norm, ALL, 2),
  "quest": KV(read=Pages(ALL, 4, 1, 0)),
  "tidaldecode": KV(read=Persistent(ALL, (0,))),
  "infllm": Retriever(),
  "by head": ByHead((((1,), KNORM),), KV(store=Exact(rotated=False))),
  "knorm, kivi": dataclasses.replace(KNORM, store=Kivi(8, 4, 4)),
  "zipcache": Mixed((8, 8), 0.4, 2),
}


@pytest.fixture(scope="module")
def masked():
  """Decoded with all entries held, and a mask."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Layer, "in_sight", lambda self, tokens: tokens)
    full = Case("full", Slots(cache=KV()), window=WINDOWS)
    sizes = [s.store.room for s in full.result[2]]
    assert sizes == [cases.PROMPT + STEPS] * 2
    return full.decoded


@pytest.mark.parametrize("name", HOLDING_ALL)
def test_what_is_held_is_enough(name, masked):
  attend = BlockMemory(2, 64, ALL, 4, 2, 8) if name == "infllm" else None
  slots = Slots(attend=attend, cache=HOLDING_ALL[name])
  few_bits = name in ("knorm, kivi", "zipcache")
  # These take long to compile.
  depth = 1 if few_bits else len(WINDOWS)
  got = Case(name, slots, depth, window=WINDOWS)
  np.testing.assert_allclose(
    got.decoded, masked[:, :depth], **(ROUGH if few_bits else FINE)
  )


def fixed(s, kept, window):
  """Decodes over what is kept of the prompt and generated, as far as seen."""
  outs = []
  for i in range(s.n, s.n + STEPS):
    seen = lambda keys, i=i: [j for j in keys if i - j < window]
    outs.append(s.out(i, [seen([*k, *range(s.n, i + 1)]) for k in kept]))
  return np.stack(outs)


def knorm(s, window):
  """The shortest keys of those that the prompt's last token sees."""
  first = max(s.n - window, 0)
  kept = []
  for g in range(GROUPS):
    score = [-np.linalg.norm(s.k[j, g]) for j in range(first, s.n)]
    kept.append([first + i for i in best(score, half(s.n - first))])
  return fixed(s, kept, window)


def streaming_llm(s, window, first=2):
  """Sinks stay as long as they are seen; then only the newest do."""
  total = max(half(min(s.n, window)), first + 1)
  cache, outs = list(range(s.n)), []
  for i in range(s.n, s.n + STEPS):
    # The prompt is cut where its last token stands, a step where it stands.
    cut = lambda cache, at: [j for j in cache if at - j < window]
    cache = cut(cache, i - 1)
    while len(cache) > total:
      del cache[sum(j < first for j in cache)]
    cache = [*cut(cache, i), i]
    if len(cache) > total:
      del cache[sum(j < first for j in cache)]
    out = []
    for h in range(HEADS):
      q = rope(s.q[i, h], len(cache) - 1)
      w = softmax(
        [SCALE * q @ rope(s.k[j, h // GROUP], at) for at, j in enumerate(cache)]
      )
      out.append(w @ s.v[cache, h // GROUP])
    outs.append(np.stack(out))
  return np.stack(outs)


@pytest.mark.parametrize("method", [knorm, streaming_llm])
def test_budgets_are_of_what_is_in_sight(method):
  c = Case(method.__name__, case(method.__name__).slots, window=WINDOWS)
  for b in range(len(LENGTHS)):
    for layer, window in enumerate(WINDOWS):
      steps = method(layer_input(c, b, layer, {}), window)
      np.testing.assert_allclose(
        c.decoded[:, layer, b], steps, rtol=2e-4, atol=2e-4,
        err_msg=f"layer {layer}, example {b}",
      )  # fmt: skip
  for state, window in zip(c.result[3], WINDOWS, strict=True):
    assert state.store.room <= window
    at = np.asarray(LENGTHS)[:, None, None] + STEPS - 1
    held = np.where(state.store.valid, at - state.store.position, 0)
    if method is streaming_llm:  # Others stand in a ring until it is full.
      assert held.max() < window


def test_layers_share_a_choice_with_those_of_their_window(masked):
  """Layer 0 selects half; layer 1 takes it over, or reads all for its own."""
  slots = lambda share: Slots(cache=KV(read=Persistent(share, (0,))))
  half = budgets.Share(0.5)
  apart = Case("tidaldecode", slots(half), window=(WINDOWS[0], None))
  np.testing.assert_allclose(apart.decoded[:, 0], masked[:, 0], **FINE)
  np.testing.assert_allclose(
    apart.decoded[:, 1], case("full").decoded[:, 1], **FINE
  )
  ring = Case("full", Slots(), window=WINDOWS[0]).decoded
  every, few = (
    Case("tidaldecode", slots(share), window=WINDOWS[0]).decoded
    for share in (ALL, half)
  )
  np.testing.assert_allclose(every, ring, **FINE)
  np.testing.assert_allclose(few[:, 0], ring[:, 0], **FINE)
  assert np.abs(few[:, 1] - ring[:, 1]).max() > 0.1


@pytest.mark.parametrize(
  "keep, window, held",
  [(0.5, None, 16), (0.5, 12, 6), (0.5, 99, 16), (0.25, 12, 4), (0.25, 3, 3)],
)
def test_a_fraction_is_one_of_the_window(keep, window, held):
  """SnapKV protects the last 4 tokens, which a smaller budget is raised to."""
  options = cases.options_of("snapkv")
  evict = recipes.get("snapkv", keep=keep, **options).cache.evict
  layer = dataclasses.replace(cases.layers()[0], window=window)
  limits = Limits.of(evict, layer, 32)
  count, last = limits.at(jnp.array([32, 2]))
  sight = min(32, window or 32)
  assert min(int(count[0]), sight) == held
  assert limits.room == held
  assert (last == 4).all() and min(int(count[1]), 2) == 2


def test_sizes_are_those_of_windows():
  slots = Slots(cache=KV())
  for layer, window in zip(cases.layers(), WINDOWS, strict=True):
    layer = dataclasses.replace(layer, window=window)
    # For each head keys, values, positions, and how many there are; then what
    # the prompt was entitled to.
    head = window * (2 * layer.head_dim + 1) + 1
    held = cases.held(slots, layer, cases.PROMPT, STEPS)
    assert physical_bytes(held) == 4 * (layer.kv_heads * head + 2)


def test_layers_that_slide_share_no_distant_tokens():
  c = Case("pod", case("pod").slots, window=(None, 5))
  with pytest.raises(ValueError, match="layer 1 has window=5.*name 1"):
    for layer in c.layers:
      c.cache.check(layer, c.attend, cases.PROMPT, STEPS)
