"""`restore`: every recipe of encoders fills the grid again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract.hosts import SMALL, VisionHost
from tokjax import budgets, interop, recipes
from tokjax.analysis import merge_map
from tokjax.models import DenseViT, DenseViTConfig
from tokjax.plan import Assignment
from tokjax.reduce.back import Back, around
from tokjax.slots import Slots

HOST = VisionHost("restoring", dataclasses.replace(SMALL, image_size=12))
PATCHES = 36
NAMES = (*recipes.names("baseline"), *recipes.names("vision"))


def run(name, images, **options):
  """Tokens behind the encoder, and its plans."""
  model = HOST.build(recipes.get(name, restore=True, **options))
  params = HOST.params(model)

  @jax.jit
  def apply(params, images):
    out = model.apply({"params": params}, images, key=jax.random.key(1))[1]
    return out["tokens"], out["plans"]

  return apply(params, images)


@pytest.mark.parametrize("name", NAMES)
def test_the_grid_is_full_and_in_order(name):
  """Of all recipes, with nothing computed."""
  model = HOST.build(recipes.get(name, keep=0.5, restore=True))
  apply = lambda images: model.init_with_output(
    jax.random.key(0), images, key=jax.random.key(1)
  )[0][1]["tokens"].x
  left = jax.eval_shape(apply, HOST.images(1)).shape[1]
  if name == "downsample":
    # The image itself is smaller: a dense head resizes its map.
    assert left < 1 + PATCHES
  else:
    assert left == 1 + PATCHES


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("topk", {}),  # drops, at the MLP
    ("ats", {"keep": 0.5}),  # drops some of the room, queries of attention
    ("mctf", {"keep": 0.5}),  # merges inside attention
    ("topk+tome", {"keep": 0.3}),  # both
  ],
)
def test_what_went_into_one_token_is_equal(name, options):
  """Merged ones are copies; dropped ones are none of what went on."""
  tokens, plans = run(name, HOST.images(2), **options)
  position = np.asarray(tokens.position)[:, 1:]
  side = np.stack(np.meshgrid(*[range(6)] * 2, indexing="ij"), -1)
  np.testing.assert_array_equal(position[0], side.reshape(-1, 2))
  whole = jax.jit(merge_map.provenance)(plans)[-1]
  found = np.asarray(jax.vmap(lambda plan: plan.index)(whole))
  for index, x in zip(found, np.asarray(tokens.x), strict=True):
    gone, left = x[index == whole.num_outputs], x[index < whole.num_outputs]
    # One value a token that is left, and those that were dropped have others.
    kinds = np.unique(index[index < whole.num_outputs])
    assert all(len(np.unique(x[index == i], axis=0)) == 1 for i in kinds)
    assert len(np.unique(left, axis=0)) == len(kinds)
    rest = len(np.unique(gone, axis=0))
    assert len(np.unique(x, axis=0)) == len(kinds) + rest
    assert len(gone) > 0 or name == "mctf"


def test_dropped_tokens_are_as_they_were_before_they_were_dropped():
  """Against the plain model cut off there: `stride` acts on a block's input."""
  images = HOST.images(1)
  budget = budgets.Once(0.5, 1)
  tokens, plans = run("stride", images, budget=budget)
  (), (plan,), () = plans
  params = HOST.params(HOST.build(Slots()))
  one = jax.jit(HOST.build(Slots(), depth=1).apply)
  before = one({"params": params}, images)[1]["tokens"].x[0]
  gone = np.asarray(jax.vmap(lambda p: p.dropped)(plan)[0])
  assert gone.sum() == 18
  after = np.asarray(tokens.x[0])
  np.testing.assert_allclose(after[gone], before[gone], rtol=1e-5, atol=1e-5)
  assert np.abs(after[~gone] - before[~gone]).max(axis=-1).min() > 1e-3


def test_merged_and_dropped_in_one_plan():
  """Source 1 joined output 0; source 3 was dropped."""
  plan = Assignment(
    jnp.array([0, 2]), jnp.array([1, 3]), jnp.array([0, 2]), num_sources=4
  )
  x = jnp.arange(8.0).reshape(4, 2)
  got = around(lambda few: few * 0 + 10, plan, x, Back(1, "last"))
  np.testing.assert_array_equal(got[:, 0], [10, 10, 10, 6])


def test_it_is_an_option_of_encoders_alone():
  joined = recipes.get("topk+tome", restore=True, keep=0.5)
  assert all(reduce.back == Back("end", "last") for reduce in joined.reduce)
  own = recipes.get("tomesd", restore=True)
  assert own == recipes.get("tomesd") and own.reduce[0].around
  with pytest.raises(TypeError, match="'snapkv': unknown option 'restore'"):
    recipes.get("snapkv", restore=True)
  with pytest.raises(ValueError, match="restore='yes': must be True or False"):
    recipes.get("tome", restore="yes")
  with pytest.raises(ValueError, match="fill='last': behind a sub-layer"):
    Back("sublayer", "last")


DENSE = DenseViTConfig(
  dataclasses.replace(
    SMALL, image_size=12, depth=2, pool="none", num_classes=None
  ),
  widths=(4,),
)  # fmt: skip


@pytest.mark.parametrize("name", ["random", "downsample"])
def test_maps_have_the_size_of_the_image(name):
  model = DenseViT(DENSE, recipes.get(name, keep=0.5, restore=True))
  images = HOST.images(2)
  found, _ = jax.jit(model.init_with_output)(
    jax.random.key(0), images, key=jax.random.key(0)
  )[0]
  assert found.shape == (2, 12, 12, 1)
  assert 0 < float(found.min()) < float(found.max()) < 1


def test_a_dense_model_refuses_what_leaves_holes():
  with pytest.raises(ValueError, match="'tome'.*restore=True"):
    DenseViT(DENSE, recipes.get("tome", keep=0.5))
  with pytest.raises(ValueError, match="pool='class': must be 'none'"):
    DenseViTConfig(SMALL)
  with pytest.raises(ValueError, match="widths=.*outputs=0|outputs=0.*widths="):
    dataclasses.replace(DENSE, widths=(0,), outputs=0)
  assert "DenseViT" in str(interop.model_shapes.specimen(DENSE)[0])
