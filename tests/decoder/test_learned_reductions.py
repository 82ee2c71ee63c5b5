"""A decoder makes, trains and uses the weights of its reductions."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.models import config
from tokjax import budgets
from tokjax.models.decoder import Decoder
from tokjax.reduce.free import Free
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import KeepTop
from tokjax.slots import Slots
from tokjax.tokens import Kind


class Scorer(nn.Module):
  """A linear score of every token."""

  @nn.compact
  def __call__(self, tokens, answers, stage):
    return nn.Dense(1, name="score")(tokens.x)[..., 0]


def learned_score(site):
  return site.learned


REDUCE = Reduce(
  KeepTop(learned_score),
  budgets.Once(0.5, 1),
  free=Free((Kind.TEXT,), last=1),
  learned=Scorer(),
)
IDS = jnp.asarray([[3, 5, 7, 9, 11, 13, 15, 17]], jnp.int32)


def test_its_weights_are_made_and_say_what_remains():
  model = Decoder(config(), Slots(REDUCE))
  params = model.init(jax.random.key(0), IDS)["params"]
  kernel = params["block_1"]["learned_0"]["score"]["kernel"]
  assert kernel.shape == (config().width, 1)
  out = model.apply({"params": params}, IDS)[1]
  _, found = model.apply(
    {"params": params},
    IDS,
    capture_intermediates=lambda module, _: module.name == "score",
  )
  score = jax.tree.leaves(found["intermediates"])[0][0, :, 0]
  kept = np.flatnonzero(out["remains"][0])
  best = np.argsort(-np.asarray(score[:-1]), kind="stable")[: len(kept) - 1]
  np.testing.assert_array_equal(kept, [*np.sort(best), 7])


def test_a_prompt_with_nothing_to_remove_makes_no_weights_and_is_refused():
  model = Decoder(config(), Slots(REDUCE, name="mine"))
  with pytest.raises(ValueError, match="'mine': .* nothing to remove"):
    model.init(jax.random.key(0), IDS[:, :1])


def test_one_that_starts_again_gets_weights_and_refuses_a_whole_sequence():
  again = dataclasses.replace(REDUCE, again=True)
  model = Decoder(config(), Slots(again))
  params = model.init(jax.random.key(0), IDS)["params"]
  assert "learned_0" in params["block_1"]
  with pytest.raises(ValueError, match="new prompt of what remains"):
    model.apply({"params": params}, IDS)
