"""Tokens that are taken back: what caches do for speculative decoding.

A model is shown several tokens at once that may be wrong. What its cache made
of those has to go again without a trace: `rewind` does that for a `KV` that
tokens are appended to and nothing else, by setting lengths back. `check`
refuses the others.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from tokjax.cache.kv import KV, KVState
from tokjax.cache.reads import ReadAll
from tokjax.cache.stores import Exact


def check(cache: Any, attend: Any, recipe: str) -> None:
  """Raises ValueError where tokens cannot be taken back exactly.

  Args:
    cache, attend: what fills the slots of a decoder.
    recipe: its name, for the message.
  """
  reason = _reason(cache, attend)
  if reason:
    raise ValueError(
      f"recipe {recipe!r}, slot 'cache': {reason}, so that tokens which were"
      " guessed wrong cannot be taken back; speculative decoding needs KV()"
      " with Exact() entries, rotated and read whole, with evict= at most"
    )


def _reason(cache: Any, attend: Any) -> str:
  """Why tokens cannot be taken back; "": they can."""
  if not isinstance(cache, KV):
    return f"{type(cache).__name__} is no KV(), which forgets by length"
  if type(cache.store) is not Exact or not cache.store.rotated:
    return f"{cache.store} does not hold rotated keys as they are"
  if type(cache.read) is not ReadAll:
    return f"{type(cache.read).__name__} keeps an index of what was appended"
  if cache.trim is not None:
    return f"{type(cache.trim).__name__} changes entries while text is made"
  if attend.leaves_notes:
    return f"{type(attend).__name__} leaves notes on entries"
  return ""


def rewindable(cache: KV) -> KV:
  """The same cache whose sliding layers are no rings.

  A ring forgets the oldest token for the newest, which cannot be undone.
  """
  assert isinstance(cache.store, Exact)
  store = dataclasses.replace(cache.store, ring=False)
  return dataclasses.replace(cache, store=store)


def rewind(state: KVState, count: Int[Array, "b"]) -> KVState:
  """The state before the newest `count` tokens of each example."""
  length = state.store.length - jnp.asarray(count)[:, None]
  return dataclasses.replace(state, store=state.store.replace(length=length))
