"""The prompt while it arrives: exact, before rotation, in chunks or at once.

Methods that compress once, after the prompt, see it whole here; what a step of
generation needs is made from it by the last chunk.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.layer import Arrivals, Layer, Memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Workspace:
  """A batch's prompts up to some chunk.

  Attributes:
    memory: `[b, prompt, ...]`; what has not come yet is not valid.
    q: queries before rotation: those of the last `window` real tokens at the
      end of the window, or of the whole prompt, `[b, w, H, D]`.
    q_position, q_valid: of those, `[b, w]`.
    filled: slots of `memory` that chunks have gone into, padding included.
    decode: how many tokens are to be generated (static).
    lse: log-sum-exps of the logits of all queries, `[b, H, prompt]`, once
      exact attention of the whole prompt has left them.
    gaps: as in `Arrivals` (static).
  """

  memory: Memory
  q: Float[Array, "b w h d"]
  q_position: Int[Array, "b w"]
  q_valid: Bool[Array, "b w"]
  filled: Int[Array, ""]
  decode: int = dataclasses.field(metadata={"static": True})
  lse: Float[Array, "b h n"] | None = None
  gaps: bool = dataclasses.field(default=False, metadata={"static": True})

  @property
  def prompt(self) -> int:
    return self.memory.valid.shape[1]

  @property
  def length(self) -> Int[Array, "b"]:
    """Real tokens so far."""
    return self.memory.valid.sum(axis=1, dtype=jnp.int32)


def start(
  layer: Layer,
  batch: int,
  prompt: int,
  decode: int,
  *,
  window: int | None = 0,
) -> Workspace:
  """An empty workspace.

  Args:
    layer: whose keys and values these are.
    batch: examples.
    prompt: capacity in tokens.
    decode: tokens to be generated.
    window: how many last queries to hold; None: all.
  """
  if prompt < 1 or decode < 0:
    raise ValueError(
      f"prompt={prompt}, decode={decode}: a prompt needs a capacity of 1 or"
      " more, decode must not be negative"
    )
  w = prompt if window is None else min(window, prompt)
  kv = jnp.zeros((batch, prompt, layer.kv_heads, layer.head_dim), layer.dtype)
  none = lambda n: jnp.zeros((batch, n), bool)
  zero = lambda n: jnp.zeros((batch, n), jnp.int32)
  q = jnp.zeros((batch, w, layer.heads, layer.head_dim), layer.dtype)
  memory = Memory(kv, kv, zero(prompt), none(prompt))
  return Workspace(memory, q, zero(w), none(w), jnp.int32(0), decode)


def add(space: Workspace, arrivals: Arrivals) -> Workspace:
  """Takes a chunk in; a chunk as long as the prompt's capacity is the prompt.

  Raises:
    ValueError: the chunk alone is longer than the capacity.
  """
  a, t = arrivals.clean(), arrivals.q.shape[1]
  if t > space.prompt:
    raise ValueError(
      f"a chunk of {t} tokens was given to a cache for prompts of"
      f" {space.prompt}; ask for prompt={t} or more when it is made"
    )
  if t == space.prompt:
    memory = Memory.of(a)
  else:
    memory = _written(space.memory, Memory.of(a), space.filled)
  w = space.q.shape[1]
  old = (space.q, space.q_position, space.q_valid)
  new = (a.q, a.position.astype(jnp.int32), a.valid)
  if w == space.prompt:
    q = new if t == w else _written(old, new, space.filled)
  else:
    q = jax.tree.map(lambda o, n: _last(o, n, a.valid, w), old, new)
  return Workspace(
    memory, *q, filled=space.filled + t, decode=space.decode,
    gaps=space.gaps or a.gaps,
  )  # fmt: skip


def in_sight(space: Workspace, layer: Layer, tokens: int) -> Memory:
  """What the last `tokens` slots that were filled can see of the memory.

  In a sliding layer these are fewer slots than all; distances of places are
  those of positions, as in any prompt that comes in chunks.
  """
  size = layer.in_sight(space.prompt) + tokens
  if size >= space.prompt:
    return space.memory
  start = jnp.maximum(space.filled - size, 0)
  cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, 1)
  return jax.tree.map(cut, space.memory)


def _written(old, new, at):
  """`new [b, t, ...]` written into `old [b, n, ...]` from slot `at` on.

  Parts that came with the chunk only (ids, inputs) start from zeros.
  """

  def write(n, o=None):
    if o is None:
      raise ValueError("a part of the arrivals appeared in a later chunk")
    return jax.lax.dynamic_update_slice_in_dim(o, n.astype(o.dtype), at, 1)

  if isinstance(old, Memory):
    n = old.valid.shape[1]
    for name in ("token", "x"):
      value = getattr(new, name)
      if value is not None and getattr(old, name) is None:
        room = (value.shape[0], n, *value.shape[2:])
        old = dataclasses.replace(old, **{name: jnp.zeros(room, value.dtype)})
  return jax.tree.map(lambda o, n: write(n, o), old, new)


def _last(old, new, valid, w):
  """The last w of `old` and the real ones of `new`, the newest at the end."""
  both = jnp.concatenate([old, new.astype(old.dtype)], axis=1)
  cut = lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, w, axis=0)
  return jax.vmap(cut)(both, valid.sum(axis=1, dtype=jnp.int32))
