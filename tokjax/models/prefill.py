"""Prefill: prompts to states of the cache and the logits of the next token.

Whole prompts, prompts in chunks, and prompts that a recipe reduces on the way
through the blocks. The model runs as the programs of
`tokjax.models.decoder_programs`, or as part of the compilation that calls this.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.attention import core
from tokjax.models.decoder import Decoder, States
from tokjax.models.decoder_block import Rows, attend_of, cache_of, positions_of
from tokjax.models.decoder_programs import Call, outside_blocks, programs_of
from tokjax.models.decoder_slots import (
  Capacities,
  capacities_of,
  stages_of,
  start_passage,
)
from tokjax.models.passage import Passage
from tokjax.models.reducer import Reducer
from tokjax.reduce.stages import Stages
from tokjax.slots import Slots

# Arrays from JAX or NumPy.
Given = Array | np.ndarray


class Prefilled(NamedTuple):
  """What prompts have become.

  Attributes:
    logits: of the next token, `[b, v]`.
    states: of every block, for decoding.
    position: of the next token in its text, `[b]`.
    shifts: by how much positions in each block lag behind, where a recipe
      renumbers them; None: not at all.
    passage: the prompts behind the last block, for a draft that reads them;
      None: the model has none.
  """

  logits: Float[Array, "b v"]
  states: States
  position: Int[Array, "b"]
  shifts: tuple[Int[Array, "b"], ...] | None = None
  passage: Passage | None = None


def check(model: Decoder, prompt: int, decode: int, chunk: int | None) -> None:
  """Raises ValueError, with the reason and the fix, for what cannot be.

  Args:
    model: built with slots.
    prompt, decode: capacities in tokens.
    chunk: tokens of a prompt taken at a time; None: all.
  """
  model.config.check_generation(prompt, decode)
  slots = model.slots
  attend, cache = attend_of(slots), cache_of(slots)
  for layer in model.layers:
    attend.check(layer, prompt)
    cache.check(layer, attend, prompt, decode)
  if chunk is None:
    return
  if chunk < 1:
    raise ValueError(f"chunk={chunk}: must be 1 or more")
  if attend.whole or slots.reduce or slots.draft is not None:
    raise ValueError(
      f"chunk={chunk}: recipe {slots.name!r} looks at whole prompts; leave out"
      " chunk="
    )


def prefill(
  model: Decoder,
  params: Any,
  tokens: Int[Given, "b n"],
  length: Int[Given, "b"],
  decode: int,
  chunk: int | None = None,
  kind: Int[Given, "b n"] | None = None,
  room: Capacities | None = None,
) -> Prefilled:
  """See `tokjax.models.generation.prefill`."""
  programs = programs_of(model)
  rows = programs.enter_prompts(outside_blocks(params), tokens, length, kind)
  return prefill_rows(model, params, rows, decode, chunk, room)


def prefill_rows(
  model: Decoder,
  params: Any,
  rows: Rows,
  decode: int,
  chunk: int | None = None,
  room: Capacities | None = None,
) -> Prefilled:
  """`prefill` of tokens that have been embedded, padding at their end.

  Args:
    model: built with slots.
    params: its parameters.
    rows: the prompts.
    decode, chunk, room: see `tokjax.models.generation.prefill`.
  """
  if chunk is not None and chunk < rows.token.shape[1]:
    return _chunked(model, params, rows, decode, chunk)
  slots = model.slots
  if any(reduce.again for reduce in slots.reduce):
    rows = _remaining(model, params, rows, decode, room)
    slots = dataclasses.replace(slots, reduce=())
  reducer = reducer_of(model, slots, rows, room)
  n = rows.token.shape[1]
  model.config.check_generation(n, decode)
  programs = programs_of(model)
  passage, states, shifts = programs.prefill(
    params,
    _start(reducer.stages, rows),
    None,
    Call(reducer.stages, n, decode, True),
  )
  renumbers = any(r.position == "renumber" for r in slots.reduce)
  logits, length = programs.leave_prompts(
    outside_blocks(params), passage, rows.valid
  )
  return Prefilled(
    logits, states, length, shifts if renumbers else None,
    passage if model.slots.draft is not None else None,
  )  # fmt: skip


def reducer_of(
  model: Decoder, slots: Slots, rows: Rows, room: Capacities | None = None
) -> Reducer:
  """The reductions of prompts.

  Args:
    model: whose blocks they pass.
    slots: its slots, or those that are left of them.
    rows: the prompts.
    room: the most tokens of each kind that a prompt has; None: unknown.
  """
  n = rows.token.shape[1]
  room = capacities_of(rows) if room is None else room
  stages = stages_of(slots, model.config, n, room)
  return Reducer.create(
    slots, stages, len(rows.token), masked=True, ragged=True, key=None
  )


@functools.partial(jax.jit, static_argnums=0)
def _start(stages: Stages, rows: Rows) -> Passage:
  return start_passage(Reducer(stages, ragged=True), rows)


def _remaining(
  model: Decoder, params: Any, rows: Rows, decode: int, room
) -> Rows:
  """What a first pass leaves, as prompts of their own: embeddings and ids."""
  stages = reducer_of(model, model.slots, rows, room).stages
  acting = [i for i, block in enumerate(stages) if block]
  if not acting:
    return rows
  call = Call(stages, rows.token.shape[1], decode, True)
  passage, _, _ = programs_of(model).prefill(
    params, _start(stages, rows), None, call, acting[-1] + 1
  )
  return _moved(passage.in_force, rows)


@jax.jit
def _moved(plans, rows: Rows) -> Rows:
  for plan in plans:
    rows = jax.vmap(_move)(plan, rows)
  return rows._replace(position=positions_of(rows.valid))


def _move(plan, rows: Rows) -> Rows:
  """What a plan leaves of one example, padding at the end."""
  valid = plan.take(rows.valid)
  if plan.valid is not None:
    valid &= plan.valid
  kind = None if rows.kind is None else plan.take(rows.kind)
  return Rows(
    plan.apply(rows.x), plan.take(rows.token), plan.take(rows.position), valid,
    kind,
  )  # fmt: skip


def _chunked(
  model: Decoder, params: Any, rows: Rows, decode: int, chunk: int
) -> Prefilled:
  """All chunks but the first and the last have the same programs.

  The first makes states, the last changes their structure.
  """
  n = rows.token.shape[1]
  programs, stages = programs_of(model), ((),) * model.config.depth
  length = rows.valid.sum(axis=1, dtype=jnp.int32)
  model.config.check_generation(n, decode)

  def through(begin, size, states, x, last=False):
    part = _cut(rows, begin, size)
    passage, states, _ = programs.prefill(
      params, _start(stages, part), states, Call(stages, n, decode, last)
    )
    return states, _pick(x, passage.tokens.x, length, begin)

  whole, rest = divmod(n, chunk)
  whole, rest = (whole, rest) if rest else (whole - 1, chunk)
  x = jnp.zeros((len(rows.x), rows.x.shape[-1]), rows.x.dtype)
  state = through(0, chunk, None, x)
  middle = np.arange(1, whole, dtype=np.int32) * chunk
  if whole > 1 and isinstance(rows.x, jax.core.Tracer):
    # Part of another compilation, which must not grow with the chunks.
    step = lambda state, begin: (through(begin, chunk, *state), None)
    state, _ = jax.lax.scan(step, state, middle)
  else:
    for begin in middle:
      state = through(begin, chunk, *state)
  states, x = through(n - rest, rest, *state, last=True)
  logits = programs.read(outside_blocks(params), x)
  return Prefilled(logits, states, length)


@functools.partial(jax.jit, static_argnums=2)
def _cut(rows: Rows, begin, size: int) -> Rows:
  return jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size, axis=1), rows
  )


@jax.jit
def _pick(x, out, length, begin):
  """Hidden states of last tokens, where they are in the chunk at `begin`."""
  t = out.shape[1]
  at = length - 1 - begin
  inside = (at >= 0) & (at < t)
  found = core.taken(out, jnp.clip(at, 0, t - 1))
  return jnp.where(inside[:, None], found, x)
