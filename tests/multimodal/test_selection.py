"""Recipes in the language model that choose, against slow decoders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.models import config, decoder, params_of
from tests.multimodal import prompts, reference
from tests.multimodal import reference_selection as slow
from tests.multimodal.prompts import DEPTH, KINDS, NAMES, PROMPTS
from tokjax import budgets, recipes
from tokjax.reduce.site import Site
from tokjax.signals import Answers
from tokjax.tokens import Tokens

CLOSE = dict(rtol=1e-4, atol=1e-4)
HALF, AT_TWO = budgets.Once(0.5), budgets.Once(0.5, 2)
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
  "efficientvla": (
    lambda: recipes.get("efficientvla", key=2, share=0.4, budget=AT_TWO),
    lambda: slow.EfficientVLA(2, 0.5, 2, 0.4, False),
  ),
  "efficientvla_sent": (
    lambda: recipes.get("efficientvla", key=2, budget=AT_TWO, sent=True),
    lambda: slow.EfficientVLA(2, 0.5, 2, 0.5, True),
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


def counts(budget, tokens, depth):
  found = budget.counts(tokens, depth)
  return {i: n for i, n in enumerate(found) if n is not None}


def test_counts_of_their_cards():
  (inside,) = recipes.get("visiondrop").reduce
  assert counts(inside.budget, 48, 32) == {8: 35, 16: 26, 24: 19}
  assert [(n + 1) * 5 // 32 for n in (35, 26, 19)] == [5, 4, 3]
  (reduce,) = recipes.get("dart").reduce
  assert counts(reduce.budget, 576, 32) == {2: 15 * 8 + 4}
  assert budgets.Multiple(0.2223).count(576, 2, 32) == 16 * 8 + 4
  (reduce,) = recipes.get("scm", last=256).reduce
  assert counts(reduce.budget, 1024 + 256, 24) == {1: 512}
  # The last visual token stays; the official code removes it, too.
  shares = counts(budgets.Ramp(0.0), 576, 28)
  assert shares == {14 + i: max(576 * (7 - i) // 8, 1) for i in range(8)}
  (again, once) = recipes.get("aim").tower("projector").reduce
  assert [again.budget.count(n, 0, 1) for n in (576, 169)] == [288, 85]
  assert again == once


@pytest.mark.parametrize(
  "make",
  [
    lambda: budgets.Ramp(1.5), lambda: budgets.Ramp(0.5, over=0.0),
    lambda: budgets.Multiple(0.5, each=0), lambda: budgets.Multiple(2.0),
    lambda: budgets.Beyond(budgets.Share(0.5), -1),
    # It would act in block 0 alone, and there is one at the end already.
    lambda: budgets.AtEnd(budgets.Once(0.5)),
  ],
)  # fmt: skip
def test_a_budget_that_cannot_be_is_refused(make):
  with pytest.raises(budgets.BudgetError, match="(keep|over|each|apart)="):
    make()


def test_tokens_far_from_the_key_ones_stay_with_their_duplicates():
  """The card of EfficientVLA: compared once, with the key tokens alone."""
  x = jnp.asarray([[1, 0], [0.9, 0.1], [-1, 0], [-1, 0], [0, 1]], jnp.float32)
  score = jnp.asarray([5.0, 4, 3, 2, 1])
  (reduce,) = recipes.get("efficientvla", key=1, share=0.4).reduce
  (question,) = reduce.asks
  answers = Answers().add(question.answered(1), score)
  rule = jax.jit(
    lambda x: reduce.rule(Site(Tokens.create(x), answers, 4, 2, 4)).anchor
  )
  # One key token, one more of the relevant ones, two that are far.
  np.testing.assert_array_equal(rule(x), [0, 1, 2, 3])


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("dart", {"visual": 0}, "visual=0"),
    ("scm", {"first": -1}, "first=-1"),
    ("mmtok", {"vision": 0.0}, "vision=0.0"),
    ("mmtok", {"share": -1.0}, "share=-1.0"),
    ("efficientvla", {"key": 0}, "key=0"),
    ("efficientvla", {"share": 2.0}, "share=2.0"),
    ("aim", {"merges": 0}, "merges=0"),
    ("aim", {"temperature": 0.0}, "temperature=0.0"),
    ("gprune", {"temperature": 0.0}, "temperature=0.0"),
    ("gprune", {"iterations": -1}, "iterations=-1"),
    ("scope", {"power": -1.0}, "power=-1.0"),
    ("turbo", {"weight": -1.0}, "weight=-1.0"),
    ("holov", {"chunks": 0}, "chunks=0"),
    ("todre", {"over": "one"}, "over='one'"),
    ("vispruner", {"share": 1.5}, "share=1.5"),
    ("vispruner", {"step": 0}, "step=0"),
  ],
)
def test_an_option_out_of_range_is_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    recipes.get(name, **options)
