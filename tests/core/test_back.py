"""Giving tokens back: bypasses, step memories, modules that combine."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.hosts import SMALL, VisionHost
from tokjax import budgets, matching
from tokjax.plan import Assignment
from tokjax.reduce.back import Back, around
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import KeepTop
from tokjax.slots import Slots

VIT = VisionHost(
  "mean", dataclasses.replace(SMALL, class_token=False, pool="mean")
)


def longest(site):
  return jnp.linalg.norm(site.x, axis=-1)


KEEP_LONGEST = KeepTop(longest)
X = jnp.arange(8.0).reshape(4, 2)
MERGE = Assignment(
  jnp.array([0, 2]), jnp.array([1, 3]), jnp.array([0, 2]), num_sources=4
)


@pytest.mark.parametrize(
  ("back", "expected"),
  [
    # Source 1 joined output 0; source 3 was dropped.
    (Back(1), [10, 10, 14, 0]),
    (Back(1, "zero"), [10, 0, 14, 0]),
    (Back(1, "input"), [10, 2, 14, 6]),
    (Back(1, "memory"), [10, 70, 14, 70]),
    (Back(1, "zero", "add"), [10, 2, 18, 6]),
  ],
)
def test_what_tokens_take_that_were_away(back, expected):
  """Column 0 of x is 0, 2, 4, 6; outputs are 10 more than their anchors."""
  plan = Assignment.select(jnp.array([0, 2]), 4)
  if back.fill == "copy":
    plan = MERGE
  function = lambda few: X[jnp.array([0, 2])] + 10
  got = around(function, plan, X, back, memory=jnp.full((4, 2), 70.0))
  np.testing.assert_array_equal(got[:, 0], expected)


def run(slots, params, images, **options):
  model = VIT.build(slots)
  apply = lambda p, x, options: model.apply({"params": p}, x, **options)[1]
  return jax.jit(apply)(params, images, options)


def test_dropped_tokens_pass_a_block_by():
  """Mixture-of-depths: block 1 works on half, the others stay as they were."""
  images = VIT.images(1)
  bypass = Reduce(KEEP_LONGEST, budgets.Once(0.5, 1), back=Back(1, "input"))
  slots = Slots(bypass, name="bypass")
  params = VIT.params(VIT.build(slots))
  out = run(slots, params, images)
  (), (plan,), () = out["plans"]
  assert out["tokens"].num_tokens == 64
  # Without the last block the two can be compared token by token.
  two = VIT.build(slots, depth=2)
  one = VIT.build(Slots(), depth=1)
  x = two.apply({"params": params}, images)[1]["tokens"].x[0]
  before = one.apply({"params": params}, images)[1]["tokens"].x[0]
  kept = np.zeros(64, bool)
  kept[np.asarray(plan.anchor[0])] = True
  assert kept.sum() == 32
  np.testing.assert_allclose(x[~kept], before[~kept], rtol=1e-5, atol=1e-5)
  assert np.abs(x[kept] - before[kept]).max(axis=-1).min() > 1e-3


def test_a_memory_fills_what_a_step_leaves_out():
  """A step cache: the first call sees all, the next ones half."""
  images = VIT.images(1)
  cached = Reduce(KEEP_LONGEST, budgets.Once(0.5, 1), back=Back(1, "memory"))
  slots = Slots(cached, name="cached")
  params = VIT.params(VIT.build(slots))
  first = run(slots, params, images)
  plain = run(Slots(), params, images)
  np.testing.assert_allclose(
    first["tokens"].x, plain["tokens"].x, rtol=1e-4, atol=1e-4
  )
  memory = {k: v + 100 for k, v in first["memory"].items()}
  again = run(slots, params, images, memory=memory)
  (), (plan,), () = again["plans"]
  left = np.asarray(again["memory"][1, 0][0])
  away = np.ones(64, bool)
  away[np.asarray(plan.anchor[0])] = False
  np.testing.assert_array_equal(left[away], np.asarray(memory[1, 0])[0][away])
  assert np.abs(left[~away]).max() < 50


def test_what_was_reduced_in_between_comes_back_too():
  """Away until the end, while a later reduction removes more."""
  outer = Reduce(KEEP_LONGEST, budgets.Once(0.75, 0), back=Back("end", "input"))
  inner = Reduce(KEEP_LONGEST, budgets.Once(0.25, 1))
  slots = Slots((outer, inner), name="nested")
  params = VIT.params(VIT.build(slots))
  out = run(slots, params, VIT.images(1))
  assert out["tokens"].num_tokens == 64
  (first,), (second,), () = out["plans"]
  assert (first.num_outputs, second.num_outputs) == (48, 16)


class Resampler(nn.Module):
  """Outputs are no sums of inputs: a linear map of the mean, by output."""

  @nn.compact
  def __call__(self, tokens, plan, stage):
    mean = tokens.x.mean(axis=1)
    m = stage.outputs
    y = nn.Dense(m * mean.shape[-1], name="out")(mean)
    return y.reshape(len(mean), m, mean.shape[-1])


def test_a_module_may_combine():
  few = Reduce(KEEP_LONGEST, budgets.Once(0.25, 1), combine=Resampler())
  slots = Slots(few, name="resampler")
  model = VIT.build(slots)
  params = VIT.params(model)
  assert "combine_0" in params["encoder"]["block_1"]
  out = run(slots, params, VIT.images(2))
  assert out["tokens"].x.shape == (2, 16, 32)
  gradient = jax.grad(
    lambda p: model.apply({"params": p}, VIT.images(1))[0].sum()
  )(params)
  module = gradient["encoder"]["block_1"]["combine_0"]
  assert np.abs(module["out"]["kernel"]).max() > 0


def test_grids_have_any_rank():
  sides = matching.grid_cells((2, 4, 4), (1, 2, 2))
  assert sides.target.tolist() == [0, 2, 8, 10, 16, 18, 24, 26]
  plan = matching.grid_pool((2, 4, 4), matching.cells_of((2, 4, 4), 4))
  assert plan.weight.shape == (4, 32)
  np.testing.assert_allclose(plan.weight.sum(axis=1), 1, rtol=1e-6)
  assert matching.cells_of((8, 8), 16) == (4, 4)


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (lambda: Back(0), "until=0.*number of blocks"),
    (lambda: Back("end", "nothing"), "(?s)fill.*nothing"),
    (lambda: Back("sublayer", "input"), "added to the input already"),
    (
      lambda: Reduce(KEEP_LONGEST, budgets.Once(0.5), back=Back("sublayer")),
      "only a reduction at 'attention'",
    ),
    (
      lambda: VIT.build(
        Slots(
          Reduce(KEEP_LONGEST, budgets.Once(0.5, 2), back=Back(4)), name="far"
        )
      ),
      "'far'.*beyond the last of 3 blocks",
    ),
  ],
)
def test_what_cannot_come_back_is_refused(build, message):
  with pytest.raises((ValueError, TypeError), match=message):
    build()
