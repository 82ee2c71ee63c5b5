"""Prompts that a method shortens on the way through the blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.models import config, decoder, params_of, tokens
from tokjax import recipes
from tokjax.models import Generator, decoder_slots
from tokjax.models import prefill as prompting
from tokjax.models.decoder_programs import Call, programs_of
from tokjax.slots import Slots

LENGTHS = np.array([12, 7])
PROMPTS = [
  row[:n].tolist() for row, n in zip(tokens(2, 12), LENGTHS, strict=True)
]


def slots_of(name, keep):
  return recipes.get(name, keep=keep, layer=0, kernel=3)


def start(slots, prompts):
  made = Generator(
    decoder(slots), params_of(config()), capacity=12, decode=3, buckets=(12,)
  )
  return made, made.prefill(prompts)


def kept_of(name, prompts):
  """Places that the first block's selection keeps."""
  slots = slots_of(name, 0.5)
  model, params = decoder(slots), params_of(config())

  def places(prompt):
    text = jnp.array([prompt], jnp.int32)
    valid = jnp.ones(text.shape, bool)
    rows = model.apply(
      {"params": params}, text, prompting.positions_of(valid), valid,
      method="enter",
    )  # fmt: skip
    reducer = prompting.reducer_of(model, model.slots, rows)
    passage = decoder_slots.start_passage(reducer, rows)
    call = Call(reducer.stages, text.shape[1], 3, True)
    passage, _, _ = programs_of(model).prefill(params, passage, None, call, 1)
    ((plan,),) = passage.plans
    return np.asarray(plan.anchor[0])[np.asarray(plan.valid[0])]

  return [places(prompt) for prompt in prompts]


def test_restarted_prompts_are_the_kept_tokens_alone():
  _, going = start(slots_of("gemfilter", 0.5), PROMPTS)
  kept = [
    [prompt[i] for i in at]
    for prompt, at in zip(PROMPTS, kept_of("gemfilter", PROMPTS), strict=True)
  ]
  assert [len(text) for text in kept] == [6, 3]
  _, alone = start(Slots(), kept)
  np.testing.assert_allclose(going.logits, alone.logits, atol=1e-5)
  np.testing.assert_array_equal(going.position, [6, 3])


@pytest.mark.parametrize("name", ["gemfilter", "promptdistill"])
def test_keeping_everything_is_the_plain_prefill(name):
  made, going = start(slots_of(name, 1.0), PROMPTS)
  _, plain = start(Slots(), PROMPTS)
  np.testing.assert_allclose(going.logits, plain.logits, atol=1e-5)
  text = [[int(t) for t in step] for step in made.stream(going, most=3)]
  assert len(text) == 3


def test_upper_blocks_hold_less_and_padding_does_not_matter():
  made, going = start(slots_of("promptdistill", 0.5), PROMPTS)
  lower, upper = (
    sum(x.size for x in jax.tree.leaves(state)) for state in going.states
  )
  assert upper < 0.75 * lower
  np.testing.assert_array_equal(going.position, LENGTHS)
  _, alone = start(slots_of("promptdistill", 0.5), [PROMPTS[1]] * 2)
  np.testing.assert_allclose(going.logits[1], alone.logits[1], atol=1e-5)
  with pytest.raises(ValueError, match=r"chunk=4.*whole prompts"):
    Generator(made.model, made.params, capacity=12, decode=3, chunk=4)
