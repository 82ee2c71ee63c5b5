"""VLA-Pruner: the selection, and steps that recall what earlier ones saw."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.cases import QUICK
from tests.decoder.models import config as language
from tests.multimodal import vlm_models
from tests.multimodal.vlm_models import IMAGE
from tokjax import budgets, recipes
from tokjax.models import VisionLanguage
from tokjax.models.control import Controller, History, gather, spread
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_top
from tokjax.reduce.site import Site
from tokjax.signals import Answers, Last, Recalled, Received, Rows
from tokjax.slots import Slots
from tokjax.tokens import Tokens

PROMPTS = ([1, IMAGE, 7, 9, 3], [2, IMAGE, 4])
LENGTH, KEPT = 3, 10
SMALL = dict(
  vision=dataclasses.replace(vlm_models.VISION, depth=1), ahead=False,
  language=language(depth=2, tied=False, length=256),
)  # fmt: skip


def slow_selection(now, before, x, keep):
  """Kept tokens, by the loops of the official code."""
  best = lambda score: np.argsort(-score, kind="stable")[:keep]
  if before is None:
    return sorted(best(now).tolist())
  union = sorted({*best(now).tolist(), *best(before).tolist()})
  if len(union) <= keep:
    return union
  unit = x[union] / np.linalg.norm(x[union], axis=1, keepdims=True)
  distance = 1 - unit @ unit.T
  picked = []
  for i in range(keep):
    if i == 0:
      score = np.sort(distance, axis=0)[1]
    else:
      score = distance[picked].min(axis=0)
    picked.append(int(np.argmax(score)))
  return sorted(union[i] for i in picked)


@pytest.fixture(scope="module")
def choose():
  """The rule over 14 tokens, the last two padding; 5 of 12 remain."""
  (reduce,) = recipes.get("vla_pruner").reduce

  @jax.jit
  def chosen(now, before, x):
    answers, shape = Answers(), (2, 14)
    for question, value in zip(
      reduce.asks, by_question(reduce, now, before, x, shape), strict=True
    ):
      own = question.answered(question.at(3, 4))
      answers = answers.add(own, value)
    tokens = Tokens.create(x, mask=jnp.arange(14) < 12)
    site = Site(tokens, answers, 6, layer=3, depth=4, due=jnp.int32(5))
    plan = reduce.rule(site)
    return plan.anchor, plan.valid

  def run(*arrays):
    anchor, valid = jax.device_get(chosen(*map(jnp.asarray, arrays)))
    return anchor[valid].tolist()

  return run


def by_question(reduce, now, before, x, shape):
  """Values in the order of the rule's questions."""
  named = {
    "Received": jnp.broadcast_to(now, shape), "Recalled": before, "Hidden": x
  }
  return [named[type(q).__name__] for q in reduce.asks]


def test_the_selection_is_that_of_the_official_code(choose):
  rng = np.random.default_rng(3)
  joined = 0
  for _ in range(12):
    now, before = rng.random((2, 14)).astype(np.float32)
    x = rng.normal(size=(14, 6)).astype(np.float32)
    # Padding must not win.
    now[12:], before[12:] = 9, 9
    expected = slow_selection(now[:12], before[:12], x[:12], 5)
    assert choose(now, before, x) == expected
    joined += expected != slow_selection(now[:12], None, x[:12], 5)
    assert choose(now, 0 * before, x) == slow_selection(now[:12], None, x, 5)
    # Equal lists leave nothing to choose.
    assert choose(now, now, x) == slow_selection(now[:12], None, x, 5)
  assert joined > 8


def test_the_last_token_may_rank_instead_of_all():
  for queries, asked in (("all", Received(-1)), ("last", Rows(-1, of=Last()))):
    (reduce,) = recipes.get("vla_pruner", queries=queries).reduce
    assert asked in reduce.asks and len(reduce.asks) == 3


def test_weights_fall_from_the_latest_step_on():
  steps = tuple(np.eye(3, dtype=np.float32)[i][None] for i in range(3))
  np.testing.assert_allclose(
    History(steps).recalled(0.8), [[0.8, 0.64, 0.512]], rtol=1e-6
  )


def slots(**changes):
  made = recipes.get(
    "vla_pruner", budget=budgets.Once(budgets.Count(KEPT), 1), **changes
  )
  return made


@pytest.fixture(scope="module")
def controller():
  made = vlm_models.generator(slots(), **SMALL)
  made = dataclasses.replace(made, buckets=(64,), image_buckets=(2,))
  return Controller(made, LENGTH, window=2, blocks=(0.0, 1.0))


@pytest.fixture(scope="module")
def steps(controller):
  """Images, tokens and histories of four steps."""
  history, found = History(), []
  for i in range(4):
    images = vlm_models.images_of(PROMPTS, seed=i)
    tokens, history = controller.act(PROMPTS, images, history)
    found.append((images, tokens, history))
  return found


def test_first_steps_are_those_of_the_plain_model(controller, steps):
  plain = vlm_models.generator(**SMALL)
  for images, tokens, _ in steps[:2]:
    assert plain.generate(PROMPTS, images) == tokens.tolist()
  last = [history for _, _, history in steps]
  assert [len(h.steps) for h in last] == [1, 2, 2, 2]
  assert last[3].steps[1] is last[2].steps[0]


def kept_by(controller, images, history):
  """1 for the visual tokens of each prompt that the model's rule keeps."""
  generator = controller.generator
  packed, _ = generator.pack(PROMPTS, images)
  told = spread(packed, history.recalled(controller.decay))
  packed = dataclasses.replace(packed, recalled=told)
  (_, (plan,)), _ = apply(generator.model, generator.params, packed)
  kept = np.zeros(packed.tokens.shape, np.float32)
  for row, anchor, valid in zip(kept, *plan, strict=True):
    row[anchor[valid]] = 1
  return gather(packed, kept)


def apply(model, params, prompts):
  """Plans of each block, and what each was asked."""

  @functools.partial(jax.jit, compiler_options=QUICK)
  def run(params, prompts):
    out = model.apply({"params": params}, prompts)[1]
    plans = [[(p.anchor, p.valid) for p in made] for made in out["plans"]]
    return plans, [answers.values[0] for answers in out["signals"]]

  return jax.device_get(run(params, prompts))


@pytest.mark.parametrize("step", [1, 3])
def test_what_is_remembered_is_attention_of_the_tokens(controller, steps, step):
  """Against a whole sequence: rows that the tokens of an action are read from.

  In pruned steps what went counts as zero.
  """
  images, tokens, history = steps[step]
  generator, reduce = controller.generator, ()
  # The last token of an action is not taken in.
  ids = [[*p, *t[:-1]] for p, t in zip(PROMPTS, tokens.tolist(), strict=True)]
  packed, _ = generator.pack(ids, images)
  if step == 3:
    kept = kept_by(controller, images, steps[2][2])
    assert (kept.sum(axis=1) == KEPT).all()
    packed = dataclasses.replace(packed, recalled=spread(packed, kept))
    budget = budgets.Once(budgets.Count(KEPT), 1)
    reduce = Reduce(keep_top(Recalled()), budget, free=VISUAL)
  asked = Rows(of=Last(LENGTH), over="mean")
  config = generator.model.config
  model = VisionLanguage(config, Slots(reduce, collect=(asked,)))
  plans, signals = apply(model, generator.params, packed)
  total = np.zeros(packed.tokens.shape)
  place = np.broadcast_to(np.arange(total.shape[1]), total.shape)
  for value, made in zip(signals, plans, strict=True):
    for anchor, valid in made:
      place = np.take_along_axis(place, anchor, axis=1)
      place = np.where(valid, place, total.shape[1] - 1)
    before = np.take_along_axis(total, place, 1)
    np.put_along_axis(total, place, before + value, 1)
  expected = gather(packed, total / len(signals))
  np.testing.assert_allclose(history.steps[0], expected, atol=1e-6)


def test_a_pruned_step_answers_as_its_kept_tokens_say(controller, steps):
  """Tokens of a later step are those of the model with the recalled scores."""
  images, tokens, _ = steps[3]
  generator = controller.generator
  packed, room = generator.pack(PROMPTS, images)
  told = spread(packed, steps[2][2].recalled(controller.decay))
  packed = dataclasses.replace(packed, recalled=told)
  going = generator.prefill_packed(packed, room)
  found = [tokens.tolist() for tokens in generator.stream(going)]
  assert np.stack(found, axis=1).tolist() == tokens.tolist()
  # As many as a prompt that recalls nothing, whose cache is as small.
  other = generator.prefill(PROMPTS, images)
  lengths = other.states[1].store.length.tolist()
  assert lengths == [[4 + KEPT] * 2, [2 + KEPT] * 2]


def test_what_cannot_be_recalled_is_refused(controller, steps):
  images, _, history = steps[3]
  with pytest.raises(ValueError, match="36 visual tokens of 2 prompts"):
    controller.act(PROMPTS[:1], images[:1], history)
  for changes, message in (
    (dict(length=9), r"length=9: must be in 1..3"),
    (dict(decay=0.0), "decay=0.0"),
    (dict(blocks=(0.5, 0.5)), "name no block"),
    (dict(generator=vlm_models.generator()), "Tally"),
  ):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(controller, **changes)
  with pytest.raises(ValueError, match="earlier prompts.*'projector'"):
    vlm_models.model(recipes.compose("divprune", slots()))
  with pytest.raises(ValueError, match="queries='text'"):
    recipes.get("vla_pruner", queries="text")
