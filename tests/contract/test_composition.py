"""Laws 9 and 10: nothing is ignored, everything composes or is refused."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract import hosts
from tests.decoder.models import config as decoder_config
from tokjax import budgets, recipes
from tokjax.models import ViT
from tokjax.models.decoder import Decoder
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import KeepTop
from tokjax.slots import TAKEN_BY, Slots
from tokjax.tokens import Kind

VIT = hosts.HOSTS[0]
LM = decoder_config(depth=4)
IMAGE = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
KEY = jax.random.key


def build_vit(slots):
  return VIT.build(slots)


def build_decoder(slots):
  return Decoder(LM, slots)


MODELS = {"vit": build_vit, "decoder": build_decoder}


def built(model, slots):
  """The model, or the message with which it is refused."""
  try:
    return MODELS[model](slots), ""
  except ValueError as error:
    return None, str(error)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_taken_or_refused_by_name(name, model):
  slots = recipes.get(name, keep=0.5)
  made, message = built(model, slots)
  if made is None:
    assert repr(name) in message
    assert any(f"'{slot}'" in message for slot in TAKEN_BY), message
  else:
    assert set(slots.filled()) <= set(TAKEN_BY)


@pytest.mark.parametrize(
  ("name", "model"),
  [
    ("snapkv", "vit"), ("gemfilter", "vit"), ("quest", "vit"),
    ("kivi", "vit"), ("sepllm", "vit"), ("xattention", "vit"),
    ("minference_a_shape", "vit"), ("lightning_attention", "vit"),
    ("tome", "decoder"), ("evit", "decoder"), ("stride", "decoder"),
    ("tomesd", "decoder"), ("sparsifiner", "decoder"),
  ],
)  # fmt: skip
def test_what_was_ignored_is_refused(name, model):
  made, message = built(model, recipes.get(name))
  assert made is None
  assert repr(name) in message


def pairs(names):
  return list(itertools.product(names, repeat=2))


def outcome(model, pair):
  """"" where a pair works, else why not."""
  try:
    slots = recipes.get("+".join(pair), keep=0.5)
  except ValueError as error:
    return str(error)
  return built(model, slots)[1]


@pytest.mark.parametrize("model", MODELS)
def test_every_pair_is_built_or_refused_with_the_reason(model):
  taken = [n for n in recipes.names() if built(model, recipes.get(n))[0]]
  works = 0
  for pair in pairs(taken):
    message = outcome(model, pair)
    works += not message
    if message:
      assert any(name in message for name in pair), (pair, message)
  assert works > 0.3 * len(taken) ** 2


def shapes_of(model):
  """Of the output and of the tokens that are left; nothing is computed."""

  def run(images):
    key = KEY(0)
    (output, out), _ = model.init_with_output(key, images, key=key)
    return output, out["tokens"].x

  return jax.eval_shape(run, IMAGE)


def test_pairs_that_are_built_run():
  """A sample, traced only: shapes and questions fit."""
  works = [p for p in pairs(hosts.names()) if not outcome("vit", p)]
  for pair in random.Random(0).sample(works, 12):
    shapes = shapes_of(VIT.build(recipes.get("+".join(pair), keep=0.5)))
    assert shapes[0].shape == (1, 5), pair


def keep_longest(site):
  return jnp.linalg.norm(site.x, axis=-1)


def keep_shortest(site):
  return -jnp.linalg.norm(site.x, axis=-1)


FIRST = Reduce(KeepTop(keep_longest), budgets.Once(0.75, 0), at="mlp")
SECOND = Reduce(
  KeepTop(keep_shortest), budgets.Constant(8, first=2), at="mlp"
)


def test_two_reductions_are_one_after_the_other():
  """The second sees what the first left, and nothing else."""
  both = Slots((FIRST, SECOND), name="both")
  model = VIT.build(both)
  params = VIT.params(model)
  run = jax.jit(lambda p, x: model.apply({"params": p}, x)[1])
  out = run(params, VIT.images(2))
  (first,), (), (second,) = out["plans"]
  alone = VIT.build(Slots(FIRST, name="first"))
  kept = jax.jit(lambda p, x: alone.apply({"params": p}, x)[1])(
    params, VIT.images(2)
  )
  np.testing.assert_array_equal(first.anchor, kept["plans"][0][0].anchor)
  p = VIT.protected
  assert first.anchor.shape[1] == p + 48
  assert second.num_sources == p + 48
  assert second.anchor.shape[1] == p + 40
  position = kept["tokens"].position
  for b in range(2):
    np.testing.assert_array_equal(
      out["tokens"].position[b], position[b][second.anchor[b]]
    )


def test_counts_run_in_either_order():
  for names, left in (("evit+tome", 32), ("tome+evit", 32)):
    shapes = shapes_of(VIT.build(recipes.get(names, keep=0.5)))
    assert abs(shapes[1].shape[1] - VIT.protected - left) <= 8, names


def test_a_reduction_that_never_acts_is_refused():
  first = Reduce(KeepTop(keep_longest), budgets.Once(0.2, 0), recipe="a")
  never = Reduce(KeepTop(keep_longest), budgets.Once(0.7, 1), recipe="b")
  with pytest.raises(ValueError, match="'ab': b never acts: fewer"):
    VIT.build(Slots((first, never), name="ab"))


def test_kinds_reduced_together_cannot_be_reduced_apart():
  from tokjax.reduce.free import Free

  both = Reduce(
    KeepTop(keep_longest), budgets.Once(0.5, 0),
    free=Free((Kind.TEXT, Kind.VISUAL)),
  )  # fmt: skip
  one = Reduce(
    KeepTop(keep_longest), budgets.Once(0.5, 1), free=Free((Kind.VISUAL,))
  )
  with pytest.raises(ValueError, match="'x'.*TEXT, VISUAL were reduced"):
    Decoder(LM, Slots((both, one), name="x"))


def test_caches_join_where_they_fill_different_parts():
  slots = recipes.compose("snapkv", "kivi")
  assert slots.cache.evict == recipes.get("snapkv").cache.evict
  assert slots.cache.store == recipes.get("kivi").cache.store
  assert slots == recipes.get("snapkv+kivi")
  with pytest.raises(ValueError, match="'snapkv' and 'knorm' both.*'cache'"):
    recipes.compose("snapkv", "knorm")
  with pytest.raises(recipes.UnknownOption, match="nonsense"):
    recipes.get("snapkv+kivi", nonsense=1)


def test_adapters_and_collected_answers_work_in_a_decoder():
  from tokjax.signals import Attention

  slots = Slots(adapter_rank=2, collect=(Attention(),), name="lora")
  model = Decoder(LM, slots)
  ids = jnp.ones((1, 6), jnp.int32)
  (logits, out), params = jax.jit(
    lambda: model.init_with_output(KEY(0), ids)
  )()
  block = params["params"]["block_0"]["attention"]
  assert block["adapt_query"]["down"]["kernel"].shape == (LM.width, 2)
  maps = [answers.of(Attention) for answers in out["signals"]]
  assert len(maps) == LM.depth
  assert maps[0].shape == (1, LM.heads, 6, 6)
  np.testing.assert_allclose(maps[0].sum(-1), 1, rtol=1e-5)
  plain = Decoder(LM).apply(
    {"params": jax.tree.map(lambda x: x, _without_adapters(params["params"]))},
    ids,
  )[0]
  np.testing.assert_allclose(logits, plain, rtol=1e-4, atol=1e-5)


def _without_adapters(params):
  """LoRA starts at zero: the model without it is the same."""
  if not isinstance(params, dict):
    return params
  return {
    name: _without_adapters(value)
    for name, value in params.items()
    if not name.startswith("adapt_")
  }


def test_pool_by_size_is_refused_where_nothing_is_pooled():
  with pytest.raises(ValueError, match="'pool_by_size'.*pool='class'"):
    ViT(VIT.config, recipes.get("tome", pool_by_size=True, keep=0.5))
