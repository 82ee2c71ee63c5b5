"""Recipes in the language model that choose, against slow decoders."""

import functools

import jax
import numpy as np
import pytest

from tests.decoder.models import config, decoder, params_of
from tests.multimodal import prompts, reference
from tests.multimodal import reference_selection as slow
from tests.multimodal.prompts import DEPTH, KINDS, NAMES, PROMPTS
from tokjax import budgets, recipes

CLOSE = dict(rtol=1e-4, atol=1e-4)
HALF = budgets.Once(0.5)
# Slots of the language model, and the slow method.
CASES = {
  "visiondrop": (
    lambda: recipes.get("visiondrop", stages=((1, 0.75), (2, 0.5))),
    lambda: slow.VisionDrop({1: 0.75, 2: 0.5}),
  ),
  "dart": (
    lambda: recipes.get("dart", keep=0.5, visual=2, text=2),
    lambda: slow.Dart(2, 0.5, 2, 2),
  ),
  "cdpruner": (
    lambda: recipes.get("cdpruner", budget=HALF), lambda: slow.CDPruner(0.5)
  ),
  "mmtok": (
    lambda: recipes.get("mmtok", budget=HALF), lambda: slow.MMTok(0.5)
  ),
  "aim": (
    lambda: recipes.get("aim", budget=budgets.Ramp(0.0, over=0.5)),
    lambda: slow.AIM({2: 0.5, 3: 0.0}),
  ),
}  # fmt: skip


@functools.cache
def run(case: str):
  """Logits and plans of all prompts as one padded batch."""
  slots = CASES[case][0]().outside_towers
  model = decoder(slots, depth=DEPTH)
  params = {"params": params_of(config(depth=DEPTH))}
  forward = jax.jit(
    lambda ids, mask, kind: model.apply(params, ids, mask=mask, kind=kind)
  )
  logits, out = forward(*prompts.packed())
  return np.asarray(logits), out


@pytest.mark.parametrize("case", CASES)
def test_kept_sets_and_logits_are_those_of_a_slow_decoder(case):
  logits, out = run(case)
  _, _, kinds = prompts.packed()
  cfg = config(depth=DEPTH)
  model = reference.Slow(cfg, params_of(cfg))
  for i, name in enumerate(NAMES):
    model.caches = [[] for _ in range(DEPTH)]
    expected = model.run(PROMPTS[name], KINDS[name], CASES[case][1]())
    kept, source = [], np.arange(prompts.LENGTH)
    for plan in (plan for made in out["plans"] for plan in made):
      before = source[kinds[i, source] == prompts.V]
      at = np.asarray(plan.anchor[i])[np.asarray(plan.valid[i])]
      source = source[at]
      now = source[kinds[i, source] == prompts.V]
      if before.tolist() != now.tolist():
        kept.append(now.tolist())
    assert kept == expected.kept, name
    last = np.flatnonzero(out["remains"][i])[-1]
    if (case, name) == ("visiondrop", "image"):
      continue  # The last token in order does not stand at the last place.
    np.testing.assert_allclose(
      logits[i, last], expected.logits[0], **CLOSE, err_msg=name
    )


def test_scm_starts_anew_with_what_the_second_block_chose():
  cfg = config(depth=DEPTH)
  made = prompts.generator(recipes.get("scm", first=1, last=2))
  found = prompts.prefilled(made).logits
  plain = prompts.generator(recipes.get("full"))
  short = [
    slow.scm(cfg, params_of(cfg), PROMPTS[name], KINDS[name], 1, 2)
    for name in NAMES
  ]
  assert [len(s) for s in short] == [18, 10, 9, 5, 6]
  again = plain.prefill(
    [[PROMPTS[n][i] for i in s] for n, s in zip(NAMES, short, strict=True)]
  )
  np.testing.assert_allclose(found, again.logits, **CLOSE)


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("dart", {"visual": 0}, "visual=0"),
    ("scm", {"first": -1}, "first=-1"),
    ("mmtok", {"vision": 0.0}, "vision=0.0"),
    ("mmtok", {"share": -1.0}, "share=-1.0"),
    ("aim", {"merges": 0}, "merges=0"),
    ("aim", {"temperature": 0.0}, "temperature=0.0"),
    ("gprune", {"temperature": 0.0}, "temperature=0.0"),
    ("gprune", {"iterations": -1}, "iterations=-1"),
    ("scope", {"power": -1.0}, "power=-1.0"),
    ("turbo", {"weight": -1.0}, "weight=-1.0"),
    ("vispruner", {"share": 1.5}, "share=1.5"),
    ("vispruner", {"step": 0}, "step=0"),
  ],
)
def test_an_option_out_of_range_is_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    recipes.get(name, **options)
