"""Sites, stages and slots: protection, static counts, padded examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import budgets, selection
from tokjax.binding import bind
from tokjax.models import ViT, ViTConfig
from tokjax.plan import Assignment, Mixture, move, move_batch
from tokjax.reduce.free import Free
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.reduce.stage import Stage
from tokjax.reduce.stages import Sequence, plan_stages
from tokjax.signals import CLASS as CLASS_ROW
from tokjax.signals import Answers, Block, Keys, Rows, asks
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens

PATCH, CLASS, REGISTER = Kind.PATCH, Kind.CLASS, Kind.REGISTER


def tokens_of(*kinds):
  n = len(kinds)
  x = jnp.arange(n, dtype=jnp.float32)[:, None] + 10
  return Tokens.create(x, kind=jnp.array(kinds, jnp.int32))


def keep_largest(site):
  top = selection.top_k(
    site.x[:, 0], site.keep, mask=site.mask, count=site.due
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
  answers = Answers((Keys(Block(0)),), (jnp.arange(8.0).reshape(1, 4, 2),))
  site = Site(tokens, answers, keep=2, protected=1)
  assert (site.num_free, site.remove) == (3, 1)
  np.testing.assert_array_equal(site.x[:, 0], [11, 12, 13])
  np.testing.assert_array_equal(site.keys[0, :, 0], [2, 4, 6])
  assert site.mask is None


@pytest.mark.parametrize("rule", [merge_all, mix_all])
def test_lifted_plans_keep_the_protected_in_front(rule):
  tokens = tokens_of(CLASS, REGISTER, PATCH, PATCH, PATCH)
  site = Site(tokens, Answers(), keep=1, protected=2)
  plan = site.lift(rule(site))
  third = 1 / 3
  expected = np.zeros((3, 5))
  expected[0, 0] = expected[1, 1] = 1
  expected[2, 2:] = third
  np.testing.assert_allclose(plan.matrix(), expected, rtol=1e-6)
  moved = move(plan, tokens)
  np.testing.assert_array_equal(moved.size, [1, 1, 3])
  np.testing.assert_array_equal(moved.kind, [CLASS, REGISTER, PATCH])


def stage_of(rule, keep, initial, protected):
  reduce = Reduce(rule, budgets.Once(keep / initial))
  return Stage(reduce, keep, 0, 1, protected, initial)


def due_of(stage, *counts):
  counts = jnp.array(counts)
  return stage.due(counts, counts)


def one_batch(tree):
  return jax.tree.map(lambda x: x[None], tree)


def test_protected_tokens_anywhere_keep_their_place():
  tokens = tokens_of(PATCH, PATCH, CLASS, PATCH, PATCH, REGISTER)
  reduce = Reduce(keep_largest, budgets.Once(0.5))
  ((stage,),) = plan_stages(
    (reduce,), Sequence(((PATCH, 4), (CLASS, 1), (REGISTER, 1)), 6), 1,
    recipe="r",
  )  # fmt: skip
  plan, _ = stage.plan(one_batch(tokens), Answers(), due=due_of(stage, 4))
  moved = move_batch(plan, one_batch(tokens))
  # The two largest patches stay; everything stands in the order it had.
  np.testing.assert_array_equal(moved.x[0, :, 0], [12, 13, 14, 15])
  np.testing.assert_array_equal(moved.kind[0], [CLASS, PATCH, PATCH, REGISTER])


def test_a_padded_example_keeps_what_it_would_keep_alone():
  tokens = tokens_of(CLASS, *[PATCH] * 8)
  mask = jnp.array([True] * 5 + [False] * 4)
  stage = stage_of(keep_largest, 4, 8, 1)
  batch = one_batch(tokens.replace(mask=mask))
  plan, _ = stage.plan(batch, Answers(), due=due_of(stage, 4))
  moved = move_batch(plan, batch)
  real = np.asarray(moved.mask[0])
  assert real.sum() == 1 + 2
  np.testing.assert_array_equal(moved.x[0, real, 0], [10, 13, 14])


def test_a_rule_that_leaves_another_number_is_named():
  stage = stage_of(merge_all, 3, 5, 0)
  with pytest.raises(ValueError, match=r"merge_all.*left 1 .*says 3"):
    stage.plan(one_batch(tokens_of(*[PATCH] * 5)), Answers())


@pytest.mark.parametrize(
  "budget",
  [
    budgets.Ratio(0.7),
    budgets.Ratio(0.7, None, "current", "ceil", extra=1),
    budgets.Even(0.3),
    budgets.Constant(2),
  ],
)
def test_padded_counts_are_those_of_every_length_alone(budget):
  depth = 8
  reduce = Reduce(keep_largest, budget)
  stages = plan_stages(
    (reduce,), Sequence(((PATCH, 40),), 40, 0), depth, recipe="r"
  )
  lengths = jnp.arange(41)
  left = lengths
  for layer, block in enumerate(stages):
    for stage in block:
      left = stage.due(lengths, left).left
    for real in (20, 33, 40):
      counts = [n for n in budget.counts(real, depth)[: layer + 1] if n]
      assert left[real] == min([real, *counts])
  # Lengths at which a budget runs out still keep one token.
  assert left[1:].min() == 1
  assert left[0] == 0


@pytest.mark.parametrize(
  ("name", "field"), [("keys", "keys"), ("class_attention", "class_attention")]
)
def test_an_absent_signal_is_named(name, field):
  site = Site(tokens_of(PATCH), Answers(), keep=1)
  with pytest.raises(ValueError, match=f"{name} is absent.*asks"):
    getattr(site, field)


def test_bad_reductions_are_refused():
  once = budgets.Once(0.5)
  with pytest.raises((ValueError, TypeError), match="at"):
    Reduce(keep_largest, once, at="nowhere")
  with pytest.raises((ValueError, TypeError), match="budget"):
    Reduce(keep_largest, 0.5)
  with pytest.raises(ValueError, match="0 or less"):
    Keys(layer=1)
  with pytest.raises((ValueError, TypeError), match="form"):
    Rows(form="nonsense")
  with pytest.raises(ValueError, match="at least one kind"):
    Free(())


def test_equal_slots_are_equal_and_hash_alike():
  def slots():
    rule = bind(keep_largest, option=(1, 2))
    return Slots(Reduce(rule, budgets.Even(0.5)), name="a")

  assert slots() == slots()
  assert hash(slots()) == hash(slots())
  assert slots() != slots().with_keep(0.25)


@asks(CLASS_ROW)
def by_class(site):
  return keep_largest(site)


@asks(Keys(-1))
def by_keys_before(site):
  return keep_largest(site)


TINY = ViTConfig(
  image_size=8, patch_size=4, width=8, depth=2, heads=1, mlp_dim=8,
  class_token=False, pool="mean",
)  # fmt: skip


def test_slots_say_what_a_model_lacks():
  slots = Slots(Reduce(by_class, budgets.Once(0.5), at="mlp"), name="mine")
  with pytest.raises(ValueError, match=r"'mine'.*CLASS.*does not have"):
    ViT(TINY, slots)


def test_attention_before_the_first_block_is_refused():
  slots = Slots(Reduce(by_keys_before, budgets.Once(0.5, 0)), name="mine")
  with pytest.raises(ValueError, match="'mine'.*before block 0"):
    ViT(TINY, slots)


def test_tokens_know_their_kinds():
  tokens = tokens_of(CLASS, PATCH, REGISTER, Kind.TEXT, Kind.DISTILLATION)
  np.testing.assert_array_equal(
    tokens.of_kind(), [True, False, True, True, True]
  )
  np.testing.assert_array_equal(
    tokens.of_kind((Kind.PATCH,)), [False, True, False, False, False]
  )
  assert tokens.num_tokens == 5
