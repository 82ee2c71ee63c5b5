"""A decoder as compiled programs, one for each kind of block.

    programs = programs_of(model)
    rows = programs.enter_prompts(rest, tokens, length, kind)
    passage, states, shifts = programs.prefill(params, passage, None, call)
    logits, length = programs.leave_prompts(rest, passage, rows.valid)
    logits, place, states = programs.decode(params, token, place, alive, states)

Blocks that are alike share a program, so the time to trace and to compile does
not grow with depth. Called within another compilation, the programs become part
of that one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax.attention import core
from tokjax.layer import Layer
from tokjax.models.decoder import Decoder, States
from tokjax.models.decoder_block import (
  Block,
  Rows,
  cache_of,
  positions_of,
  rows_of,
)
from tokjax.models.decoder_slots import arriving, split_position
from tokjax.models.passage import Passage
from tokjax.models.products import Compiled
from tokjax.models.reducer import Reducer
from tokjax.models.shared_programs import Shared, shapes_of
from tokjax.reduce.stages import Stages

Shifts = tuple[Int[Array, "b"], ...]


@dataclasses.dataclass(frozen=True)
class Call:
  """What is static in a prefill.

  Attributes:
    stages: of every block.
    prompt, decode: tokens that states are made for, before reductions.
    last: it is the last chunk; then states are those for decoding.
  """

  stages: Stages
  prompt: int
  decode: int
  last: bool


class DecoderPrograms:
  """The programs of one decoder; see the module.

  Parameters are those of the decoder; `rest` are those outside of blocks, see
  `outside_blocks`.
  """

  def __init__(self, model: Decoder):
    self.model, self.layers = model, model.layers
    self.read = Compiled(self._read, model.dtype)
    self.enter_prompts: Any = jax.jit(self._entering)  # Many rows.
    self.leave_prompts = Compiled(self._leaving, model.dtype)
    self._step_in = Compiled(self._entered, model.dtype)
    self._step_out = Compiled(self._left, model.dtype)
    self._several_out = Compiled(self._left_several, model.dtype)
    self._step = Shared(self._block_step, donate=(4,), dtype=model.dtype)
    self._steps: dict[Any, list[Any]] = {}
    self._quiet: dict[tuple[int, int, bool, bool], Shared] = {}
    self._acting: dict[tuple[Call, int], Any] = {}

  def compiled(self) -> int:
    """How many programs were compiled; those of others do not count."""
    own: tuple[Any, ...] = (
      self.read, self.leave_prompts, self._step_in, self._step_out,
      self._several_out,
    )  # fmt: skip
    acting = (f._cache_size() for f in self._acting.values())
    return sum(
      [self.enter_prompts._cache_size(), *acting]
      + [one.compiled() for one in own]
      + [shared.compiled() for shared in (self._step, *self._quiet.values())]
    )

  def prefill(
    self,
    params: Any,
    passage: Passage,
    states: States | None,
    call: Call,
    blocks: int | None = None,
  ) -> tuple[Passage, States, Shifts]:
    """Takes prompts, or a chunk of them, through the blocks.

    Args:
      params: of the decoder.
      passage: of the prompts, see `start_passage`; padding is at the end of
        each prompt, so that later chunks may be all padding.
      states: from the chunk before, whose buffers are taken over; None: it is
        the first.
      call: what is static.
      blocks: go through the first of them only; None: all.

    Returns:
      The passage behind the blocks, states, and for each block by how much its
      positions lag behind those of the text, `[b]`.
    """
    reducer = Reducer(call.stages, ragged=True)
    carry, out, shifts = {}, [], []
    for i, layer in enumerate(self.layers[:blocks]):
      weights = params[f"block_{i}"]
      state = None if states is None else states[i]
      passage = passage.replace(plans=(*passage.plans, ()))
      if acts(reducer, passage, i):
        run = self._acting_block(call, layer)
        passage, state, carry = run(weights, passage, state, carry)
      else:
        passage = passage.replace(attended=passage.shift)
        rows = rows_of(passage)
        x, state, carry = self._quiet_block(call, layer, passage.gaps)(
          layer, weights, rows, state, carry
        )
        passage = passage.replace(tokens=passage.tokens.replace(x=x))
      shifts.append(passage.attended)
      out.append(state)
    return passage, tuple(out), tuple(shifts)

  def decode(
    self,
    params: Any,
    tokens: Int[Array | np.ndarray, "b"],
    position: Int[Array | np.ndarray, "b"],
    valid: Bool[Array, "b"],
    states: States,
    shifts: Shifts | None = None,
    ahead: Int[Array, "b"] | None = None,
  ) -> tuple[Float[Array, "b v"], Int[Array, "b"], States]:
    """Logits of the token after these, the place of that one, and states.

    Args:
      params: of the decoder.
      tokens: the newest id of each example.
      position: their places in their texts.
      valid: False for examples that are complete: their states stay.
      states: of every block; their buffers are taken over.
      shifts: by how much positions in each block lag behind those of the text,
        where a recipe renumbers them; None: not at all.
      ahead: by how much the coordinates of each text are ahead of places, where
        positions have several axes; None: not at all.
    """
    rest = outside_blocks(params)
    rows, after = self._step_in(rest, tokens, position, valid, ahead)
    x, states = self._through(params, rows, states, shifts)
    return self._step_out(rest, x), after, states

  def several(
    self,
    params: Any,
    tokens: Int[Array, "b t"],
    position: Int[Array, "b"],
    valid: Bool[Array, "b t"],
    states: States,
    shifts: Shifts | None = None,
    ahead: Int[Array, "b"] | None = None,
  ) -> tuple[Float[Array, "b t v"], Float[Array, "b t d"], States]:
    """`decode` of t tokens of each example at once.

    Args:
      params: of the decoder.
      tokens: ids that follow each other.
      position: of the first of them, in its text.
      valid: False behind the last real one.
      states, shifts, ahead: as in `decode`; the cache is one that
        `tokjax.cache.several.check` lets pass.

    Returns:
      Logits of the token after each, normed features, and states.
    """
    rest = outside_blocks(params)
    rows, _ = self._step_in(rest, tokens, position, valid, ahead)
    x, states = self._through(params, rows, states, shifts)
    logits, features = self._several_out(rest, x)
    return logits, features, states

  def _through(
    self, params: Any, rows: Rows, states: States, shifts: Shifts | None
  ) -> tuple[Float[Array, "b t d"], States]:
    """Tokens that are decoded go through the blocks."""
    layers = self.layers
    shifts = (None,) * len(layers) if shifts is None else shifts
    # Weights of another dtype make the same programs again, for that dtype.
    key = shapes_of((rows, states, shifts))
    steps, x, carry, out = self._steps.get(key, []), rows.x, {}, []
    for i, layer in enumerate(layers):
      args = (
        params[f"block_{i}"], rows._replace(x=x), shifts[i], carry, states[i]
      )  # fmt: skip
      if i == len(steps):
        steps.append(self._step.program(layer, *args))
      x, state, carry = steps[i](np.int32(i), *args)
      out.append(state)
    self._steps[key] = steps
    return x, tuple(out)

  def _quiet_block(self, call: Call, layer: Layer, gaps: bool) -> Shared:
    """The program of a block in which nothing is reduced or asked."""
    prompt = arriving(call.stages, layer.index, call.prompt)
    key = (prompt, call.decode, call.last, gaps)
    if key in self._quiet:
      return self._quiet[key]

    def run(layer, weights, rows, state, carry):
      position, offset = split_position(rows.position)
      return self._block(layer).apply(
        {"params": weights},
        rows._replace(position=position, offset=offset),
        self._started(layer, state, rows.x, prompt, call.decode),
        carry,
        call.last,
        gaps,
        method="prefill_rows",
      )

    # The last chunk's states have another form: there is no buffer to reuse.
    self._quiet[key] = Shared(run, donate=() if call.last else (2,))
    return self._quiet[key]

  def _acting_block(self, call: Call, layer: Layer) -> Any:
    """The program of a block that reduces tokens or is asked about them."""
    key = (call, layer.index)
    if key in self._acting:
      return self._acting[key]
    prompt = arriving(call.stages, layer.index, call.prompt)
    reducer = Reducer(call.stages, ragged=True)

    def run(weights, passage, state, carry):
      state = self._started(
        layer, state, passage.tokens.x, prompt, call.decode
      )
      done: Any = self._block(layer).apply(
        {"params": weights}, passage, state, carry, call.last, reducer,
        method="prefill",
      )  # fmt: skip
      passage, (state, carry), _ = done
      return reducer.give_back(passage, layer.index), state, carry

    self._acting[key] = jax.jit(run)
    return self._acting[key]

  def _block(self, layer: Layer) -> Block:
    model = self.model
    return Block(model.config, model.slots, layer, model.dtype)

  def _started(self, layer: Layer, state, x, prompt: int, decode: int):
    """The state before the first chunk, or that from the chunk before."""
    if state is not None:
      return state
    return cache_of(self.model.slots).init(layer, len(x), prompt, decode)

  def _block_step(self, layer, weights, rows, shift, carry, state):
    if shift is not None:
      rows = rows._replace(position=rows.position - shift[:, None])
      if rows.offset is not None:
        # Coordinates are not counted anew.
        rows = rows._replace(offset=rows.offset + shift[:, None, None])
    return self._block(layer).apply(
      {"params": weights}, rows, state, carry, method="decode"
    )

  def _entering(self, rest, tokens, length, kind):
    """Prompts, padded at their end, as they enter the first block."""
    valid = jnp.arange(tokens.shape[1])[None] < length[:, None]
    return self.model.apply(
      {"params": rest}, tokens, positions_of(valid), valid, kind, method="enter"
    )

  def _leaving(self, rest, passage, valid):
    """Logits of the token after prompts, and its place in the text."""
    logits = self._read(rest, last_hidden(passage))
    return logits, valid.sum(axis=1, dtype=jnp.int32)

  def _read(self, rest, x) -> Any:
    return self.model.apply({"params": rest}, x, method="read")

  def _entered(self, rest, tokens, position, valid, ahead) -> Any:
    """Of one token of each example `[b]`, or of several `[b, t]`."""
    tokens, valid = (x.reshape(len(position), -1) for x in (tokens, valid))
    place = position[:, None] + jnp.arange(tokens.shape[1])[None]
    coordinates = None
    if ahead is not None:
      coordinates = jnp.broadcast_to(
        (place + ahead[:, None])[..., None],
        (*tokens.shape, self.model.config.axes),
      )
    rows = self.model.apply(
      {"params": rest}, tokens, place, valid, coordinates=coordinates,
      method="enter",
    )  # fmt: skip
    return rows, position + valid.sum(axis=1, dtype=position.dtype)

  def _left(self, rest, x):
    return self._read(rest, x)[:, 0]

  def _left_several(self, rest, x) -> Any:
    """Logits and features."""
    return self.model.apply(
      {"params": rest}, x, method=lambda own, x: (own.read(x), own.norm(x))
    )


# Models whose programs are held. A program takes five or more of the memory
# maps of a process, of which Linux allows 65530: a deep model whose blocks all
# differ can hold thousands, and a process that runs out of them is killed.
HELD = 16


@functools.lru_cache(maxsize=HELD)
def programs_of(model: Decoder) -> DecoderPrograms:
  """The programs of a decoder; equal ones share them.

  Those of the models that were used last are held.
  """
  return DecoderPrograms(model)


def outside_blocks(params: Any) -> Any:
  """Parameters of a decoder that belong to no block."""
  return {
    name: x for name, x in params.items() if not name.startswith("block_")
  }


def last_hidden(passage: Passage) -> Float[Array, "b d"]:
  """Hidden states of the last real token of each example."""
  tokens = passage.tokens
  places, real = passage.places, tokens.mask
  real: Any = real if places is None else places.mask  # Always there.
  at = jnp.maximum(real.sum(axis=1) - 1, 0)
  if places is not None:
    at = core.taken(places.owner, at)
  return core.taken(tokens.x, at)


def acts(reducer: Reducer, passage: Passage, layer: int) -> bool:
  """Whether a block reduces tokens, gives some back, or is asked about them."""
  return bool(
    reducer.stages[layer]
    or reducer.asked_of_attention(layer)
    or reducer.gives_back(passage, layer)
  )
