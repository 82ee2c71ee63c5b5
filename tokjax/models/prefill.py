"""Prefill: prompts to states of the cache and the logits of the next token.

Whole prompts, prompts in chunks, and prompts that a method shortens on the way
(the slot `prompt`). Everything here is traced: `tokjax.models.generation`
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

Apply = Callable[..., Any]


class Prefilled(NamedTuple):
  """What prompts have become.

  Attributes:
    logits: of the next token, `[b, v]`.
    states: of every block, for `Decoder.decode`.
    position: of the next token in its text, `[b]`.
  """

  logits: Float[Array, "b v"]
  states: States
  position: Int[Array, "b"]


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
  if attend.whole or slots.prompt is not None:
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
) -> Prefilled:
  """See `tokjax.models.generation.prefill`."""
  apply: Apply = functools.partial(model.apply, {"params": params})
  valid = jnp.arange(tokens.shape[1])[None] < length[:, None]
  rows = apply(tokens, positions_of(valid), valid, method="enter")
  select = model.slots.prompt
  if select is not None and select.restart:
    return _restarted(model, params, rows, decode)
  if select is not None:
    rows, states = _narrowed(model, apply, rows, decode)
  elif chunk is None or chunk >= tokens.shape[1]:
    states = start(model, rows, decode)
    rows, states, _ = apply(rows, states, method="prefill")
  else:
    return _chunked(model, apply, rows, length, decode, chunk)
  return Prefilled(
    apply(last_row(rows), method="read"), states, length.astype(jnp.int32)
  )


def start(
  model: Decoder, rows: Rows, decode: int, first: int = 0, stop: int = -1
) -> States:
  """States before the first token, of the blocks from `first` to `stop`."""
  model.config.check_generation(rows.token.shape[1], decode)
  layers = model.layers[first : len(model.layers) if stop < 0 else stop]
  cache, (b, n) = cache_of(model.slots), rows.token.shape
  return tuple(cache.init(layer, b, n, decode) for layer in layers)


def last_row(rows: Rows) -> Float[Array, "b d"]:
  """Hidden states of the last real token of each example."""
  at = jnp.maximum(rows.valid.sum(axis=1) - 1, 0)
  return jax.vmap(lambda x, i: x[i])(rows.x, at)


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

  def step(state, i):
    states, x = state
    out, states, _ = apply(cut(i, chunk), states, last=False, method="prefill")
    return (states, _pick(x, out, length, i)), None

  x = jnp.zeros((b, rows.x.shape[-1]), rows.x.dtype)
  state, _ = step((start(model, rows, decode), x), 0)
  if whole > 1:
    state, _ = jax.lax.scan(step, state, jnp.arange(1, whole) * chunk)
  states, x = state
  out, states, _ = apply(cut(n - rest, rest), states, method="prefill")
  x = _pick(x, out, length, n - rest)
  return Prefilled(apply(x, method="read"), states, length.astype(jnp.int32))


def _pick(x, rows: Rows, length, begin):
  """Hidden states of last tokens, where they are in the chunk at `begin`."""
  t = rows.token.shape[1]
  at = length - 1 - begin
  inside = (at >= 0) & (at < t)
  found = jax.vmap(lambda x, i: x[i])(rows.x, jnp.clip(at, 0, t - 1))
  return jnp.where(inside[:, None], found, x)


def _narrowed(model, apply, rows: Rows, decode: int) -> tuple[Rows, States]:
  """The blocks above see what the selection leaves."""
  select = model.slots.prompt
  at = select.at(model.config.depth)
  states = start(model, rows, decode, 0, at + 1)
  rows, states, arrivals = apply(
    rows, states, blocks=(0, at + 1), method="prefill"
  )
  plan = select.plan(model.layers[at], arrivals)
  rows = jax.vmap(_move)(plan, rows)
  rest = start(model, rows, decode, at + 1)
  blocks = (at + 1, model.config.depth)
  rows, rest, _ = apply(rows, rest, blocks=blocks, method="prefill")
  return rows, states + rest


def _restarted(model, params, rows: Rows, decode: int) -> Prefilled:
  """The selected ids are a prompt of their own."""
  select = model.slots.prompt
  at = select.at(model.config.depth)
  apply: Apply = functools.partial(model.apply, {"params": params})
  states = start(model, rows, decode, 0, at + 1)
  _, _, arrivals = apply(rows, states, blocks=(0, at + 1), method="prefill")
  rows = jax.vmap(_move)(select.plan(model.layers[at], arrivals), rows)
  plain = model.clone(slots=dataclasses.replace(model.slots, prompt=None))
  length = rows.valid.sum(axis=1)
  return prefill(plain, params, rows.token, length, decode)


def _move(plan, rows: Rows) -> Rows:
  """What a plan leaves of one example, padding at the end."""
  valid = plan.take(rows.valid)
  if plan.valid is not None:
    valid &= plan.valid
  return Rows(
    plan.apply(rows.x), plan.take(rows.token), plan.take(rows.position), valid
  )
