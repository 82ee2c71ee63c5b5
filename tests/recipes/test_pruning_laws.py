"""Padding, gradients, batches and NaN, for pruning and baselines alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.recipes.answering import answers_of
from tests.recipes.sites_pruning import (
  WIDTH,
  chain,
  rows,
  signals_of,
  stage_of,
  tokens_of,
)
from tokjax import budgets, recipes, signals
from tokjax.plan import move_batch
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.reduce.stages import Sequence, plan_stages
from tokjax.signals import Answers
from tokjax.tokens import Kind

# Lengths of one padded batch; the shortest is not reduced where others are.
LENGTHS = (14, 9, 3)
ONCE = budgets.Ratio(0.7, (2,), "current", "ceil")
RECIPES = {
  "topk": ONCE,
  "evit": budgets.Ratio(0.7, (1, 2), "current", "ceil", extra=1),
  "ats": budgets.Capped(1.0, 2),
  "zero_tprune": ONCE,
  "random": ONCE,
  "stride": ONCE,
  "center": ONCE,
}


def slots_of(name: str):
  return recipes.get(name, budget=RECIPES[name])


def padded(name):
  """The batch, and the slots in it that are real."""
  n = 1 + max(LENGTHS)
  x = np.full((len(LENGTHS), n, WIDTH), 7.0, np.float32)
  mask = np.zeros((len(LENGTHS), n), bool)
  for e, length in enumerate(LENGTHS):
    # Noise belongs to a slot, so that random needs its padding at the end.
    rng = np.random.default_rng(e)
    at = 1 + np.arange(length)
    if name != "random":
      at = 1 + np.sort(rng.permutation(n - 1)[:length])
    mask[e, 0] = mask[e, at] = True
    x[e, mask[e]] = rows(e, 1 + length, WIDTH)
  return tokens_of(x, mask), mask


@pytest.mark.parametrize("name", RECIPES)
def test_a_padded_example_equals_the_example_alone(name):
  slots = slots_of(name)
  tokens, mask = padded(name)
  keys = jax.random.split(jax.random.key(0), len(LENGTHS))
  run = jax.jit(lambda t, k: chain(slots, t, k))
  together = run(tokens, keys)
  for e in (1, 2):
    take = lambda a, e=e: a[e : e + 1, mask[e]]
    alone = tokens.replace(
      x=take(tokens.x),
      size=take(tokens.size),
      position=take(tokens.position),
      kind=take(tokens.kind),
      mask=None,
    )
    alone = run(alone, keys[e : e + 1])
    real = np.asarray(together.mask[e])
    mine = slice(None) if alone.mask is None else np.asarray(alone.mask[0])
    for field in ("x", "size", "position", "kind"):
      np.testing.assert_allclose(
        getattr(together, field)[e][real],
        getattr(alone, field)[0][mine],
        atol=1e-5,
        err_msg=f"{name}: {field} of the example of length {LENGTHS[e]}",
      )


@pytest.mark.parametrize(
  "budget",
  [
    budgets.Even(0.5),
    budgets.Ratio(0.7),
    budgets.Ratio(0.7, None, "current", "ceil", extra=1),
    budgets.Once(0.5),
    budgets.Square(0.5),
    budgets.Capped(0.6),
    budgets.Ratio(0.7).with_keep(0.3),
  ],
)
def test_a_shorter_example_never_keeps_more(budget):
  """Every length up to 64 as an example of one batch."""
  reduce = Reduce(len, budget)
  sequence = Sequence(((Kind.PATCH, 64),), 64, 0)
  lengths = jnp.arange(65)
  left, acts = lengths, np.zeros((65, 12), bool)
  blocks = plan_stages((reduce,), sequence, 12, recipe="some")
  for layer, block in enumerate(blocks):
    for stage in block:
      due = stage.due(lengths, left)
      left, acts[:, layer] = due.left, due.acts
      assert np.all(np.diff(left) >= 0)
  for real in (1, 5, 64):
    counts = budget.counts(real, 12)
    assert list(acts[real]) == [after is not None for after in counts]


@pytest.mark.parametrize("name", ["topk", "evit", "ats", "zero_tprune"])
def test_gradients_are_finite_and_only_weights_carry_them(name):
  tokens = tokens_of(rows(3, 2, 10, WIDTH))
  stage = stage_of(name, 9, 2)
  answers = answers_of(stage.reduce, 2, 4, **signals_of(tokens))

  @jax.jit
  def gradients(x, answers):
    def loss(x, answers):
      given = tokens.replace(x=x)
      plan, _ = stage.plan(given, answers)
      return (move_batch(plan, given).x ** 2).sum()

    return jax.grad(loss, argnums=(0, 1))(x, answers)

  grads = gradients(tokens.x, answers)
  for leaf in jax.tree.leaves(grads):
    assert np.all(np.isfinite(leaf))
  dx, ds = grads
  assert np.any(dx != 0)
  moved = {q: np.any(ds[q] != 0) for q in ds.questions}
  assert moved == {
    q: name == "evit" and isinstance(q, signals.Rows) for q in moved
  }


def test_evit_weights_have_the_right_gradient():
  """Of the fused token's squared length: 2 f . x_j for what it holds."""
  tokens = tokens_of(rows(4, 1, 8, WIDTH))
  stage = stage_of("evit", 7, 2)
  attention = signals_of(tokens)["class_attention"]

  def loss(attention):
    given = answers_of(stage.reduce, 2, 4, class_attention=attention)
    plan, _ = stage.plan(tokens, given)
    fused = move_batch(plan, tokens).x[0, -1]
    return (fused**2).sum(), (fused, plan)

  grad, (fused, plan) = jax.jit(jax.grad(loss, has_aux=True))(attention)
  expected = 2 * np.asarray(tokens.x[0]) @ np.asarray(fused) / 3
  kept = np.asarray(plan.anchor[0, :-1])
  expected[kept] = 0
  np.testing.assert_allclose(
    grad, np.broadcast_to(expected, grad.shape), atol=1e-5
  )


@pytest.mark.parametrize("name", ["evit", "ats"])
def test_one_batch_equals_its_examples(name):
  tokens = tokens_of(rows(5, 3, 10, WIDTH))
  slots = slots_of(name)
  run = jax.jit(lambda t: chain(slots, t))
  together = run(tokens)
  for e in range(3):
    alone = run(jax.tree.map(lambda a, e=e: a[e : e + 1], tokens))
    for a, b in zip(
      jax.tree.leaves(together), jax.tree.leaves(alone), strict=True
    ):
      np.testing.assert_allclose(a[e], b[0], atol=1e-6)


@pytest.mark.parametrize("name", ["evit", "ats"])
def test_nan_stays_in_its_example_and_a_masked_out_one_gives_nothing(name):
  slots = slots_of(name)
  tokens, mask = padded(name)
  keys = jax.random.split(jax.random.key(0), len(LENGTHS))
  run = jax.jit(lambda t: chain(slots, t, keys))
  clean = run(tokens)
  # The first example is all NaN, the third has no patch that is real.
  x = tokens.x.at[0].set(jnp.nan)
  empty = tokens.mask.at[2, 1:].set(False)
  out = run(tokens.replace(x=x, mask=empty))
  for field in ("x", "size", "position", "mask"):
    np.testing.assert_array_equal(
      getattr(out, field)[1], getattr(clean, field)[1]
    )
  assert not np.any(out.mask[2, 1:])
  np.testing.assert_array_equal(out.x[2, 0], tokens.x[2, 0])


def test_the_class_token_need_not_come_first():
  """Page rank finds it by kind; patches are those that are not protected."""
  tokens = tokens_of(rows(6, 2, 10, WIDTH))
  roll = lambda a, axis: jnp.roll(a, 4, axis)
  moved = jax.tree.map(lambda a: roll(a, 1), tokens)
  given = signals_of(tokens)
  rolled = dict(
    keys=roll(given["keys"], 2),
    attention=roll(roll(given["attention"], 2), 3),
  )
  stage = stage_of("zero_tprune", 9, 2)
  # The class token, and what the budget leaves.
  aside = dataclasses.replace(
    stage, leading=False, protected=0, spare=1, room=1 + stage.keep
  )
  answers = lambda arrays: answers_of(stage.reduce, 2, 4, **arrays)
  first, _ = jax.jit(stage.plan)(tokens, answers(given))
  other, _ = jax.jit(aside.plan)(moved, answers(rolled))
  for e in range(2):
    kept = set(np.asarray((first.anchor[e] + 4) % 10))
    assert set(np.asarray(other.anchor[e])) == kept


def test_a_rule_says_which_signal_it_lacks():
  tokens = tokens_of(rows(0, 1, 6, WIDTH))
  site = Site(tokens, Answers(), 3, protected=1)
  with pytest.raises(ValueError, match="class_attention.*asks"):
    recipes.get("topk").reduce[0].rule(site)
