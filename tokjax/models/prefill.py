"""Prefill: prompts to states of the cache and the logits of the next token.

Whole prompts, prompts in chunks, and prompts that a recipe reduces on the way
through the blocks. Everything here is traced: `tokjax.models.generation`
compiles it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.models.decoder import (
  Decoder,
  Rows,
  States,
  attend_of,
  cache_of,
  positions_of,
)
from tokjax.models.decoder_slots import (
  Capacities,
  capacities_of,
  stages_of,
  start_passage,
)
from tokjax.models.reducer import Passage, Reducer
from tokjax.reduce.stages import Stages
from tokjax.slots import Slots

Apply = Callable[..., Any]


class Prefilled(NamedTuple):
  """What prompts have become.

  Attributes:
    logits: of the next token, `[b, v]`.
    states: of every block, for `Decoder.decode`.
    position: of the next token in its text, `[b]`.
    shifts: by how much positions in each block lag behind, where a recipe
      renumbers them; None: not at all.
  """

  logits: Float[Array, "b v"]
  states: States
  position: Int[Array, "b"]
  shifts: tuple[Int[Array, "b"], ...] | None = None


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
  if attend.whole or slots.reduce:
    raise ValueError(
      f"chunk={chunk}: recipe {slots.name!r} looks at whole prompts; leave out"
      " chunk="
    )


def prefill(
  model: Decoder,
  params: Any,
  tokens: Int[Array, "b n"],
  length: Int[Array, "b"],
  decode: int,
  chunk: int | None = None,
  kind: Int[Array, "b n"] | None = None,
  room: Capacities | None = None,
) -> Prefilled:
  """See `tokjax.models.generation.prefill`."""
  apply: Apply = functools.partial(model.apply, {"params": params})
  valid = jnp.arange(tokens.shape[1])[None] < length[:, None]
  rows = apply(tokens, positions_of(valid), valid, kind, method="enter")
  return prefill_rows(model, apply, rows, decode, chunk, room)


def prefill_rows(
  model: Decoder,
  apply: Apply,
  rows: Rows,
  decode: int,
  chunk: int | None = None,
  room: Capacities | None = None,
) -> Prefilled:
  """`prefill` of tokens that have been embedded, padding at their end.

  Args:
    model: built with slots.
    apply: its `apply`, with parameters.
    rows: the prompts.
    decode, chunk, room: see `tokjax.models.generation.prefill`.
  """
  if chunk is not None and chunk < rows.token.shape[1]:
    length = rows.valid.sum(axis=1, dtype=jnp.int32)
    return _chunked(model, apply, rows, length, decode, chunk)
  slots = model.slots
  if any(reduce.again for reduce in slots.reduce):
    rows = _remaining(model, apply, rows, decode, room)
    slots = dataclasses.replace(slots, reduce=())
  reducer = reducer_of(model, slots, rows, room)
  states = start(model, rows, decode, reducer.stages)
  passage, states, shifts = apply(
    start_passage(reducer, rows), states, reducer, method="prefill"
  )
  renumbers = any(r.position == "renumber" for r in slots.reduce)
  return Prefilled(
    apply(last_hidden(passage), method="read"),
    states,
    rows.valid.sum(axis=1, dtype=jnp.int32),
    shifts if renumbers else None,
  )


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


def arriving(stages: Stages, layer: int, tokens: int) -> int:
  """Tokens that the attention of a block is given, of prompts of `tokens`."""
  away: list[tuple[int, int]] = []
  for at, block in enumerate(stages[: layer + 1]):
    back_now = [before for until, before in away if until <= at]
    away = [one for one in away if one[0] > at]
    tokens = back_now[0] if back_now else tokens
    for stage in block:
      back = stage.reduce.back
      if at == layer and stage.reduce.at != "input":
        continue
      if back is not None and isinstance(back.until, int):
        away.append((at + back.until, tokens))
      tokens = stage.outputs
  return tokens


def start(
  model: Decoder,
  rows: Rows,
  decode: int,
  stages: Stages | None = None,
  blocks: int | None = None,
) -> States:
  """States before the first token, of all blocks or of the first `blocks`."""
  model.config.check_generation(rows.token.shape[1], decode)
  cache, (b, n) = cache_of(model.slots), rows.token.shape
  stages = ((),) * len(model.layers) if stages is None else stages
  return tuple(
    cache.init(layer, b, arriving(stages, layer.index, n), decode)
    for layer in model.layers[:blocks]
  )


def last_hidden(passage: Passage) -> Float[Array, "b d"]:
  """Hidden states of the last real token of each example."""
  tokens = passage.tokens
  real: Any = tokens.mask  # A decoder's tokens always have one.
  at = jnp.maximum(real.sum(axis=1) - 1, 0)
  return jax.vmap(lambda x, i: x[i])(tokens.x, at)


def _remaining(
  model: Decoder, apply: Apply, rows: Rows, decode: int, room
) -> Rows:
  """What a first pass leaves, as prompts of their own: embeddings and ids."""
  (reduce,) = model.slots.reduce
  reducer = reducer_of(model, model.slots, rows, room)
  acting = [i for i, block in enumerate(reducer.stages) if block]
  if not acting:
    return rows
  stop = acting[-1] + 1
  states = start(model, rows, decode, reducer.stages, stop)
  passage = start_passage(reducer, rows)
  passage, _, _ = apply(
    passage, states, reducer, blocks=(0, stop), method="prefill"
  )
  for plan in passage.in_force:
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


def _chunked(model, apply, rows, length, decode, chunk) -> Prefilled:
  """All chunks but the first and the last are one scan.

  The first may change the structure of states, the last does.
  """
  b, n = rows.token.shape
  cut = lambda i, size: jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, i, size, axis=1), rows
  )
  whole, rest = divmod(n, chunk)
  whole, rest = (whole, rest) if rest else (whole - 1, chunk)
  reducer = reducer_of(model, model.slots, rows)

  def through(part, states, last):
    passage = start_passage(reducer, part)
    passage, states, _ = apply(
      passage, states, reducer, last=last, method="prefill"
    )
    return passage.tokens.x, states

  def step(state, i):
    states, x = state
    out, states = through(cut(i, chunk), states, False)
    return (states, _pick(x, out, length, i)), None

  x = jnp.zeros((b, rows.x.shape[-1]), rows.x.dtype)
  state, _ = step((start(model, rows, decode), x), 0)
  if whole > 1:
    state, _ = jax.lax.scan(step, state, jnp.arange(1, whole) * chunk)
  states, x = state
  out, states = through(cut(n - rest, rest), states, True)
  x = _pick(x, out, length, n - rest)
  return Prefilled(apply(x, method="read"), states, length.astype(jnp.int32))


def _pick(x, out, length, begin):
  """Hidden states of last tokens, where they are in the chunk at `begin`."""
  t = out.shape[1]
  at = length - 1 - begin
  inside = (at >= 0) & (at < t)
  found = jax.vmap(lambda x, i: x[i])(out, jnp.clip(at, 0, t - 1))
  return jnp.where(inside[:, None], found, x)
