"""A recipe in a decoder: prompts are taken, then some tokens one by one."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.cache.cases import QUICK
from tests.contract.case import BATCH, KEY, Case
from tests.contract.decoder_host import (
  CAPACITY,
  LENGTHS,
  STEPS,
  VISUAL,
  DecoderHost,
)
from tokjax.cache.entries import physical_bytes
from tokjax.models import generation
from tokjax.slots import Slots
from tokjax.tokens import Kind


def turned(slot: Any) -> bool:
  """Whether `keep` changes what fills a slot."""
  turn = getattr(slot, "with_keep", None)
  return turn is not None and turn(0.5) != turn(1.0)


def reduces_visual(slots: Slots) -> bool:
  """Whether VISUAL tokens are reduced and text stays."""
  free = {kind for r in slots.reduce for kind in r.free.kinds}
  return Kind.VISUAL in free and Kind.TEXT not in free


def room_of(prompt: int) -> tuple[tuple[Kind, int], ...]:
  """The most tokens of each kind in the prompts that are not longer."""
  examples = [
    (length - tokens, tokens)
    for length, (_, tokens) in zip(LENGTHS, VISUAL, strict=True)
    if length <= prompt
  ]
  text, visual = map(max, *examples, (0, 0))
  return (Kind.TEXT, text), (Kind.VISUAL, visual)


class DecoderCase(Case):
  """Results: "output", the logits after the prompt and after every step, and
  "stored", the bytes of the caches behind the prompts.
  """

  exact = False

  @property
  def output_shape(self) -> tuple[int, ...]:
    return (BATCH, 1 + STEPS, self.host.config.vocabulary)

  @property
  def takes_mask(self) -> bool:
    return True

  @property
  def visual(self) -> bool:
    return reduces_visual(self.slots)

  def program(self, slots: Slots):
    """One program for a prompt and all steps."""
    model = self.host.build(slots)

    def forward(params, inputs, key):
      del key  # Recipes that draw are refused by decoders.
      n = inputs["prompt"].shape[1]
      kind = room = None
      if self.visual:
        kind = inputs["kind"]
        room = room_of(n)
      start = generation.prefill(
        model, params, inputs["prompt"], inputs["length"], STEPS, None, kind,
        room,
      )  # fmt: skip

      def step(going, token):
        going = generation.decode_step(model, params, going, token)
        return going, going.logits

      _, logits = jax.lax.scan(step, start, inputs["text"].T)
      logits = jnp.concatenate([start.logits[None], logits])
      stored = physical_bytes(jax.tree.leaves(start.states))
      # Known when the program is traced, whatever is in the batch.
      bytes_ = jnp.full(inputs["length"].shape, stored, jnp.int32)
      return {"output": jnp.swapaxes(logits, 0, 1), "stored": bytes_}

    return jax.jit(forward, compiler_options=QUICK)

  @functools.cached_property
  def batch(self):
    return self.program(self.slots)

  @property
  def other_inputs(self):
    return jax.tree.map(lambda x: x[::-1], self.inputs)

  def padded_with(self, garbage: int) -> dict[str, jax.Array]:
    """The prompts with this id as padding."""
    real = np.arange(CAPACITY) < np.asarray(self.inputs["length"])[:, None]
    prompt = jnp.where(real, self.inputs["prompt"], garbage)
    return {**self.inputs, "prompt": prompt}

  @functools.cached_property
  def nan_params(self) -> tuple[Any, int]:
    """Parameters with an id whose embedding is NaN, and that id."""
    bad = self.host.config.vocabulary - 1
    table = self.params["embed"]["embedding"].at[bad].set(jnp.nan)
    return {**self.params, "embed": {"embedding": table}}, bad

  @property
  def nan_inputs(self):
    params, bad = self.nan_params
    prompt = self.inputs["prompt"].at[1, 2].set(bad)
    return params, {**self.inputs, "prompt": prompt}

  def padded_and_alone(self) -> Iterator[tuple[dict, dict]]:
    cut = {name: x[1:2] for name, x in self.inputs.items()}
    for name in ("prompt", "kind"):
      cut[name] = cut[name][:, : LENGTHS[1]]
    alone = self.run(cut)
    yield {"output": self.clean["output"][1]}, {"output": alone["output"][0]}

  def with_garbage(self) -> tuple[dict, dict]:
    params, bad = self.nan_params
    return self.run(self.padded_with(bad), params=params), self.clean

  def keeping_all(self) -> tuple[dict, dict] | None:
    slots = self.host.slots(self.recipe, 1.0)
    whole = self.program(slots)(self.params, self.inputs, KEY(0))
    return tuple(
      {"output": found["output"]}
      for found in (jax.device_get(whole), plain(self.host))
    )

  @property
  def keeps_all(self) -> bool:
    """Whether keep=1.0 leaves the plain model, for the prompt and the steps.

    It does where tokens are reduced, or a budget says what a cache holds. Not
    where attention has a form of its own, nor where entries are trimmed or
    left unread at every step: the budget is that of the prompt.
    """
    slots, cache = self.slots, self.slots.cache
    evict = getattr(cache, "evict", cache)
    once = hasattr(evict, "budget") and getattr(cache, "trim", None) is None
    return slots.attend is None and (bool(slots.reduce) or once)

  @property
  def stores_less(self) -> bool:
    """Whether a budget is of what is stored, not of what is read."""
    cache = self.slots.cache
    stored = turned(cache) and getattr(cache, "evict", cache) is not None
    return bool(self.slots.reduce) or stored


@functools.cache
def plain(host: DecoderHost) -> dict:
  """Results of the model without a recipe."""
  return DecoderCase("full", host).clean

