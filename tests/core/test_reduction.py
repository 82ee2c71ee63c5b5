"""Sites, stages and slots: protection, static counts, padded examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import schedules, selection
from tokjax.plan import Assignment, Mixture, move, move_batch
from tokjax.reduce.reduction import Reduce, Slots, bind
from tokjax.reduce.site import Site
from tokjax.reduce.stage import Stage, count_table
from tokjax.tokens import Kind, Signals, Tokens

PATCH, CLASS, REGISTER = Kind.PATCH, Kind.CLASS, Kind.REGISTER


def tokens_of(*kinds):
  n = len(kinds)
  x = jnp.arange(n, dtype=jnp.float32)[:, None] + 10
  return Tokens.create(x, kind=jnp.array(kinds, jnp.int32))


def keep_largest(site):
  top = selection.top_k(
    site.x[:, 0], site.keep, mask=site.mask, count=site.count
  )
  index, valid = selection.in_order(top)
  return Assignment.select(index, site.num_free, valid)


def merge_all(site):
  """All free tokens into the first, by size."""
  n = site.num_free
  parent = jnp.zeros((n,), jnp.int32)
  return Assignment.from_parent(parent, 1).weighted(site.size)


def mix_all(site):
  n = site.num_free
  weight = jnp.full((1, n), 1 / n)
  return Mixture(weight, jnp.ones((1, n)), jnp.ones((n, 1)), jnp.array([0]))


def test_a_rule_sees_free_tokens_only():
  tokens = tokens_of(CLASS, PATCH, PATCH, PATCH)
  signals = Signals(keys=jnp.arange(8.0).reshape(1, 4, 2))
  site = Site(tokens, signals, keep=2, protected=1)
  assert (site.num_free, site.remove) == (3, 1)
  np.testing.assert_array_equal(site.x[:, 0], [11, 12, 13])
  np.testing.assert_array_equal(site.keys[0, :, 0], [2, 4, 6])
  assert site.mask is None


@pytest.mark.parametrize("rule", [merge_all, mix_all])
def test_lifted_plans_keep_the_protected_in_front(rule):
  tokens = tokens_of(CLASS, REGISTER, PATCH, PATCH, PATCH)
  site = Site(tokens, Signals(), keep=1, protected=2)
  plan = site.lift(rule(site))
  third = 1 / 3
  expected = np.zeros((3, 5))
  expected[0, 0] = expected[1, 1] = 1
  expected[2, 2:] = third
  np.testing.assert_allclose(plan.matrix(), expected, rtol=1e-6)
  moved = move(plan, tokens)
  np.testing.assert_array_equal(moved.size, [1, 1, 3])
  np.testing.assert_array_equal(moved.kind, [CLASS, REGISTER, PATCH])


def stage_of(rule, keep, initial, protected, **options):
  reduce = Reduce(rule, schedules.Once(keep / initial))
  return Stage(reduce, keep, 0, 1, protected, initial, **options)


def one_batch(tree):
  return jax.tree.map(lambda x: x[None], tree)


def test_protected_tokens_anywhere_keep_their_place():
  tokens = tokens_of(PATCH, PATCH, CLASS, PATCH, PATCH, REGISTER)
  stage = stage_of(keep_largest, 2, 4, 2, leading=False)
  plan = stage.plan(one_batch(tokens), Signals())
  moved = move_batch(plan, one_batch(tokens))
  # The two largest patches stay; everything stands in the order it had.
  np.testing.assert_array_equal(moved.x[0, :, 0], [12, 13, 14, 15])
  np.testing.assert_array_equal(moved.kind[0], [CLASS, PATCH, PATCH, REGISTER])


def test_a_padded_example_keeps_what_it_would_keep_alone():
  tokens = tokens_of(CLASS, *[PATCH] * 8)
  mask = jnp.array([True] * 5 + [False] * 4)
  stage = stage_of(keep_largest, 4, 8, 1)
  batch = one_batch(tokens.replace(mask=mask))
  plan = stage.plan(batch, Signals(), real=jnp.array([4]))
  moved = move_batch(plan, batch)
  real = np.asarray(moved.mask[0])
  assert real.sum() == 1 + 2
  np.testing.assert_array_equal(moved.x[0, real, 0], [10, 13, 14])


def test_a_rule_that_leaves_another_number_is_named():
  stage = stage_of(merge_all, 3, 5, 0)
  with pytest.raises(ValueError, match=r"merge_all.*left 1 .*says 3"):
    stage.plan(one_batch(tokens_of(*[PATCH] * 5)), Signals())


@pytest.mark.parametrize(
  "schedule",
  [
    schedules.Ratio(0.7),
    schedules.Ratio(0.7, None, "current", "ceil", extra=1),
    schedules.Even(0.3),
    schedules.Constant(2),
  ],
)
def test_count_table_is_the_schedule_of_every_length(schedule):
  depth = 8
  table = count_table(schedule, 40, depth)
  for real in (20, 33, 40):
    left, alone = real, []
    for after in schedule.counts(real, depth):
      left = left if after is None else after
      alone.append(left)
    np.testing.assert_array_equal(table[real], alone)
  # Lengths at which a schedule runs out still keep one token.
  assert table[1:].min() == 1


@pytest.mark.parametrize(
  ("name", "field"), [("keys", "keys"), ("class_attention", "class_attention")]
)
def test_an_absent_signal_is_named(name, field):
  site = Site(tokens_of(PATCH), Signals(), keep=1)
  with pytest.raises(ValueError, match=f"'{name}' is absent.*needs"):
    getattr(site, field)


def test_bad_reductions_are_refused():
  once = schedules.Once(0.5)
  with pytest.raises((ValueError, TypeError), match="at"):
    Reduce(keep_largest, once, at="nowhere")
  with pytest.raises(ValueError, match=r"unknown signals \['nonsense'\]"):
    Reduce(keep_largest, once, needs=("nonsense",))
  with pytest.raises((ValueError, TypeError), match="schedule"):
    Reduce(keep_largest, 0.5)


def test_equal_slots_are_equal_and_hash_alike():
  def slots():
    rule = bind(keep_largest, option=(1, 2))
    return Slots(Reduce(rule, schedules.Even(0.5)), name="a")

  assert slots() == slots()
  assert hash(slots()) == hash(slots())
  assert slots() != slots().with_keep(0.25)


def test_slots_say_what_a_model_lacks():
  slots = Slots(
    Reduce(keep_largest, schedules.Once(0.5), needs=("class_attention",)),
    name="mine",
  )
  with pytest.raises(ValueError, match=r"'mine'.*class_attention.*plain"):
    slots.check(tokens=8, depth=2, provides=("keys",), model="plain")


def test_attention_before_the_first_block_is_refused():
  reduce = Reduce(
    keep_largest, schedules.Once(0.5, 0), at="before_block", needs=("keys",)
  )
  with pytest.raises(ValueError, match="before block 0"):
    Slots(reduce).check(tokens=8, depth=2, provides=("keys",), model="m")


def test_tokens_know_their_kinds():
  tokens = tokens_of(CLASS, PATCH, REGISTER, Kind.TEXT, Kind.DISTILLATION)
  np.testing.assert_array_equal(
    tokens.of_kind(), [True, False, True, True, True]
  )
  np.testing.assert_array_equal(
    tokens.of_kind((Kind.PATCH,)), [False, True, False, False, False]
  )
  assert tokens.num_tokens == 5
