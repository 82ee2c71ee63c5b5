"""More recipes in the language model, against slow decoders and cards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.cases import QUICK
from tests.decoder.models import config, params_of
from tests.multimodal import prompts, reference
from tests.multimodal import reference_inside as slow
from tests.multimodal.prompts import DEPTH, KINDS, NAMES, PROMPTS
from tokjax import budgets, recipes, scores
from tokjax.models import vlm_seen
from tokjax.models.decoder import Decoder
from tokjax.reduce.site import Site
from tokjax.signals import Answers, Peaks, Transition
from tokjax.tokens import Tokens

CLOSE = dict(rtol=1e-4, atol=1e-4)
HALF = budgets.Once(0.5)
STAGES = {1: 0.8, 2: 0.6, 3: 0.3}
LEAST = 0.5
ROOM, LOW = {1: 0.9, 2: 0.5}, (0.03, 0.1)
# What an encoder says of the token at each place.
KEY = np.random.default_rng(2).random(prompts.LENGTH).astype(np.float32)


def mustdrop(together, alone):
  slots = recipes.get(
    "mustdrop", room=budgets.Stages(ROOM), share=0.15, together=together,
    alone=alone,
  )  # fmt: skip
  return slots.outside_towers


# Slots of the language model, and the slow method.
CASES = {
  "transprune": (
    lambda: recipes.get("transprune", stages=tuple(STAGES.items()), since=1),
    lambda: slow.TransPrune(STAGES, 1),
  ),
  "transprune_from_the_first": (
    lambda: recipes.get("transprune", stages=((2, 0.5),), since=0),
    lambda: slow.TransPrune({2: 0.5}, 0),
  ),
  "trim": (
    lambda: recipes.get("trim", budget=HALF), lambda: slow.Trim(0.5, True)
  ),
  "trim_fixed": (
    lambda: recipes.get("trim", budget=HALF, adaptive=False),
    lambda: slow.Trim(0.5, False),
  ),
  "trim_cosine": (
    lambda: recipes.get(
      "trim", budget=HALF, adaptive=False, similarity="cosine"
    ),
    lambda: slow.Trim(0.5, False, cosine=True),
  ),
  "mustdrop": (
    lambda: mustdrop(0.03, 0.1), lambda: slow.MustDrop(ROOM, KEY, 0.15, *LOW)
  ),
  "mustdrop_more": (
    lambda: mustdrop(0.06, 0.2),
    lambda: slow.MustDrop(ROOM, KEY, 0.15, 0.06, 0.2),
  ),
  # Block 2 of 4: of the prompts with images one loses them.
  "todre_late": (
    lambda: recipes.get("todre", least=LEAST, late=0.5).outside_towers,
    lambda: slow.AllOrNone(2, LEAST),
  ),
  "lvlm_csp": (
    lambda: recipes.get(
      "lvlm_csp", until=1, clusters=budgets.Once(budgets.Count(4)),
      budget=budgets.Once(0.25, 3),
    ),
    lambda: slow.Csp(4, 1, 3, 0.25),
  ),
}  # fmt: skip


@functools.cache
def run(case: str):
  """Logits and plans of all prompts as one padded batch."""
  slots, known = CASES[case][0](), Answers()
  for question in vlm_seen.asked(slots):
    rows = jnp.broadcast_to(KEY, (len(NAMES), prompts.LENGTH))
    known = known.add(question, rows)
  model = Decoder(config(depth=DEPTH), slots, images=True)
  params = {"params": params_of(config(depth=DEPTH))}
  forward = jax.jit(
    lambda ids, mask, kind: model.apply(
      params, ids, mask=mask, kind=kind, known=known
    ),
    compiler_options=QUICK,
  )  # fmt: skip
  logits, out = forward(*prompts.packed())
  return np.asarray(logits), out


def kept_of(out, i: int, back: bool) -> list[list[int]]:
  """Places of the visual tokens that each reduction left of a prompt.

  With `back` all are there again before the next one.
  """
  _, _, kinds = prompts.packed()
  kept, whole = [], np.arange(prompts.LENGTH)
  visual = lambda source: source[kinds[i, source] == prompts.V].tolist()
  now, source = visual(whole), whole
  for plan in (plan for made in out["plans"] for plan in made):
    source = whole if back else source
    taken = source[np.asarray(plan.anchor[i])[np.asarray(plan.valid[i])]]
    for left in (source, taken):
      before, now = now, visual(left)
      if before != now:
        kept.append(now)
    source = taken
  return kept


@pytest.mark.parametrize("case", CASES)
def test_kept_sets_and_logits_are_those_of_a_slow_decoder(case):
  logits, out = run(case)
  back = any(reduce.back for reduce in CASES[case][0]().reduce)
  cfg = config(depth=DEPTH)
  model = reference.Slow(cfg, params_of(cfg))
  for i, name in enumerate(NAMES):
    model.caches = [[] for _ in range(DEPTH)]
    expected = model.run(PROMPTS[name], KINDS[name], CASES[case][1]())
    assert kept_of(out, i, back) == expected.kept, name
    last = expected.tokens[-1].source
    np.testing.assert_allclose(
      logits[i, last], expected.logits[0], **CLOSE, err_msg=name
    )


def test_transitions_of_their_card():
  """u=(3,4): o=(6,8) stretches by 2 without a turn, o=-u turns by 2."""
  before = jnp.asarray([[3.0, 4], [3, 4], [3, 4]])
  after = jnp.asarray([[6.0, 8], [-3, -4], [9, 9]])
  found = jax.jit(scores.transition)(before, after, jnp.arange(3) < 2)
  share = np.exp([0.0, 2.0]) / np.exp([0.0, 2.0]).sum()
  np.testing.assert_allclose(found, [2 * share[0], share[1], 0], rtol=1e-6)


@pytest.mark.parametrize(("threshold", "keep"), [(0.3, 50), (0.9, 30)])
def test_windows_merge_as_in_a_slow_version(threshold, keep):
  """MustDrop; the second setting leaves too little room."""
  grid, rng = (6, 9), np.random.default_rng(1)
  x = rng.normal(size=(54, 5)).astype(np.float32)
  # Windows that are more and less alike.
  x += np.repeat(np.repeat(rng.uniform(0, 3, (2, 3)), 3, 0), 3, 1).reshape(
    -1, 1
  )
  expected = slow.merged_windows(x, 3, grid, threshold, keep)
  slots = recipes.get("mustdrop", threshold=threshold).tower("vision")
  (reduce,) = slots.reduce

  @jax.jit
  def merged(x):
    plan = reduce.rule(Site(Tokens.create(x), Answers(), keep, grid=grid))
    return plan.apply(x), plan.valid

  found, valid = merged(x)
  np.testing.assert_allclose(found[valid], expected, **CLOSE)
  assert valid.sum() < 54
  with pytest.raises(ValueError, match=r"side=3.*\(6, 10\)"):
    reduce.rule(
      Site(Tokens.create(jnp.zeros((60, 5))), Answers(), 50, grid=(6, 10))
    )


def test_what_no_text_attends_to_of_its_card():
  """Column sums .5, .3, .0001, g=.001: the third goes, unless one row is h."""
  (reduce,) = recipes.get("mustdrop", share=0.0).reduce
  asked = reduce.asks
  for peak, kept in ((0.0005, [0, 1]), (0.002, [0, 1, 2])):
    answers = Answers()
    for question in asked:
      own = question.answered(question.at(2, 4))
      value = jnp.asarray([0.5, 0.3, 0.0001])
      if isinstance(question, Peaks):
        value = jnp.asarray([0.4, 0.2, peak])
      if own not in answers:
        answers = answers.add(own, value)
    made = Site(Tokens.create(jnp.zeros((3, 2))), answers, 3, layer=2, depth=4)
    plan = reduce.rule(made).plan
    assert np.asarray(plan.anchor)[np.asarray(plan.valid)].tolist() == kept


def test_counts_of_their_cards():
  (reduce,) = recipes.get("transprune").reduce
  found = reduce.budget.counts(576, 32)
  assert {i: n for i, n in enumerate(found) if n} == {7: 504, 9: 360, 12: 72}
  left = np.array([576] * 7 + [504] * 2 + [360] * 3 + [72] * 20)
  assert left.mean() == 236.25
  (moved,) = [q for q in reduce.asks if isinstance(q, Transition)]
  for block, counted in ((7, {6}), (9, {6, 7, 8}), (12, set(range(6, 12)))):
    asked = moved.answered(moved.at(block, 32))
    assert {i for i in range(32) if asked.about(i, 32)} == counted


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("trim", {"similarity": "sum"}, "similarity='sum'"),
    ("mustdrop", {"side": 1}, "side=1"),
    ("mustdrop", {"share": 1.5}, "share=1.5"),
    ("lvlm_csp", {"centres": "random"}, "centres='random'"),
    ("hired", {"share": 1.5}, "share=1.5"),
    ("globalcom2", {"temperature": 0.0}, "temperature=0.0"),
    ("vflowopt", {"ratios": (0.5, 0.5)}, r"ratios=\(0.5, 0.5\)"),
    ("vflowopt", {"ratios": (0.5, 0.0, 1.0)}, "ratios=0.0"),
    ("vflowopt", {"cell": 0.5}, "cell=0.5"),
  ],
)
def test_an_option_out_of_range_is_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    recipes.get(name, **options)
