"""What a cache holds: entries of key heads, moved by plans.

Arrays are those of a batch and its key heads, `[b, G, n, ...]`. Heads and
examples may hold different numbers: the first `length` places of each count,
the others are room. Entries stand in the order of the text, except in a ring: a
sliding layer has room for its window, and once that is full, a new entry takes
the place of the oldest one, which no later query sees.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.attention import core
from tokjax.layer import Layer, Memory
from tokjax.plan import Assignment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Entries:
  """Keys and values of cached tokens.

  Attributes:
    k, v: `[*b, n, D]`.
    position: in the text, `[*b, n]`.
    length: how many count, `[*b]`.
    extra: what else belongs to an entry, `[*b, n, ...]` each. "count": for how
      many tokens it stands; log(count) is added to its logits.
  """

  k: Float[Array, "*b n d"]
  v: Float[Array, "*b n d"]
  position: Int[Array, "*b n"]
  length: Int[Array, "*b"]
  extra: dict[str, Array] = dataclasses.field(default_factory=dict)

  @property
  def room(self) -> int:
    return self.position.shape[-1]

  @property
  def valid(self) -> Bool[Array, "*b n"]:
    shape = self.position.shape
    place = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    return place < self.length[..., None]

  def replace(self, **changes) -> "Entries":
    return dataclasses.replace(self, **changes)

  def map(
    self, fn: Callable[[Array], Array], length: Int[Array, "*b"]
  ) -> "Entries":
    """`fn` of every array that has a row for each entry, another length."""
    k, v, position, extra = jax.tree.map(
      fn, (self.k, self.v, self.position, self.extra)
    )
    return Entries(k, v, position, length, extra)


def of_memory(layer: Layer, memory: Memory, rotated: bool) -> Entries:
  """A whole prompt, every head alike; keys rotated to their positions or not.

  Returns:
    Entries `[b, G, n]`.
  """
  k = layer.rotate(memory.k, memory.position) if rotated else memory.k
  k, v = core.heads_first(k), core.heads_first(memory.v)
  shape = k.shape[:3]
  position = memory.position.astype(jnp.int32)[:, None]
  length = memory.valid.sum(axis=1, dtype=jnp.int32)[:, None]
  return Entries(
    k.astype(layer.dtype),
    v.astype(layer.dtype),
    jnp.broadcast_to(position, shape),
    jnp.broadcast_to(length, shape[:2]),
  )


def over_heads(fn, *trees):
  """`fn` of one head of one example, lifted over both axes."""
  return jax.vmap(jax.vmap(fn))(*trees)


def move(plan: Assignment, entries: Entries) -> Entries:
  """One head's entries through a plan; what merged counts for its members."""
  extra = {name: plan.take(x) for name, x in entries.extra.items()}
  if "count" in extra:
    extra["count"] = plan.total(entries.extra["count"])
  valid = (
    jnp.ones((plan.num_outputs,), bool) if plan.valid is None else (plan.valid)
  )
  return Entries(
    plan.apply(entries.k),
    plan.apply(entries.v),
    plan.take(entries.position),
    valid.sum(dtype=jnp.int32),
    extra,
  )


def with_room(entries: Entries, room: int) -> Entries:
  """The same with `room` places, behind those that are there.

  Raises:
    ValueError: there are more already.
  """
  more = room - entries.room
  if more < 0:
    raise ValueError(f"room={room}: {entries.room} entries are there already")

  def pad(x, axis):
    width = [(0, 0)] * x.ndim
    width[axis] = (0, more)
    return jnp.pad(x, width)

  axis = entries.position.ndim - 1
  return entries.map(lambda x: pad(x, axis), entries.length)


def newest(entries: Entries, room: int) -> Entries:
  """The last `room` entries of each head, which stand in order."""
  if room >= entries.room:
    return entries

  def one(e):
    start = jnp.maximum(e.length - room, 0)
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, room)
    return e.map(cut, jnp.minimum(e.length, room))

  return over_heads(one, entries)


def without_aged(
  entries: Entries,
  layer: Layer,
  position: Int[Array, "b"],
  valid: Bool[Array, "b"],
) -> Entries:
  """Entries in order without those that a query at `position` cannot see.

  Where not `valid`, nothing goes; without a window neither.
  """
  if layer.window is None:
    return entries

  def one(e, position, valid):
    aged = e.valid & (e.position <= position - layer.window) & valid
    count = aged.sum(dtype=jnp.int32)
    return e.map(lambda x: jnp.roll(x, -count, axis=0), e.length - count)

  wide = lambda x: jnp.broadcast_to(x[:, None], entries.length.shape)
  return over_heads(one, entries, wide(position), wide(valid))


def places_for(
  count: int, position: Int[Array, "n"], valid: Bool[Array, "n"]
) -> Int[Array, "count"]:
  """Where that many new entries go: empty places, then those of the oldest."""
  age = jnp.where(valid, position, -1)
  if count == 1:
    return jnp.argmin(age)[None]
  return jax.lax.top_k(-age, count)[1]


def order(entries: Entries) -> Int[Array, "*b n"]:
  """How many entries of its head are older than each, in a ring or in order."""
  age = jnp.where(entries.valid, entries.position, jnp.iinfo(jnp.int32).max)
  start = jnp.argmin(age, axis=-1, keepdims=True)
  place = jax.lax.broadcasted_iota(jnp.int32, age.shape, age.ndim - 1)
  return (place - start) % entries.room


def append(
  entries: Entries,
  k: Float[Array, "b g d"],
  v: Float[Array, "b g d"],
  position: Int[Array, "b"],
  valid: Bool[Array, "b"],
  ring: bool = False,
) -> Entries:
  """One token more in every head of the examples where it is `valid`.

  Without room it is lost, or in a `ring` takes the place of the oldest entry.
  """

  def one(e, k, v, position, valid):
    free = places_for(1, e.position, e.valid)[0] if ring else e.length
    # Without room or where nothing came, the write falls off the end.
    at = jnp.where(valid, free, e.room)
    put = lambda x, new: x.at[at].set(jnp.asarray(new, x.dtype), mode="drop")
    extra = {
      name: put(x, jnp.zeros(x.shape[1:])) for name, x in e.extra.items()
    }
    if "count" in extra:
      extra["count"] = put(e.extra["count"], 1.0)
    length = jnp.minimum(e.length + valid, e.room)
    return Entries(
      put(e.k, k), put(e.v, v), put(e.position, position), length, extra
    )

  heads = k.shape[:2]
  wide = lambda x: jnp.broadcast_to(x[:, None], heads)
  return over_heads(one, entries, k, v, wide(position), wide(valid))


def stamp(
  entries: Entries, name: str, value: Array, valid: Bool[Array, "b"]
) -> Entries:
  """Sets what belongs to the newest entry of examples where it is `valid`."""

  def one(x, length, value, valid):
    at = jnp.where(valid, length - 1, x.shape[0])
    return x.at[at].set(value, mode="drop")

  wide = lambda x: jnp.broadcast_to(x[:, None], entries.length.shape)
  new = over_heads(
    one, entries.extra[name], entries.length, wide(value), wide(valid)
  )
  return entries.replace(extra={**entries.extra, name: new})


def logical_bytes(entries: Entries) -> Float[Array, "b"]:
  """Bytes of what counts, keys, values and what goes with them."""
  one = sum(
    x.dtype.itemsize * x[0, 0, 0].size
    for x in jax.tree.leaves(
      (entries.k, entries.v, entries.position, entries.extra)
    )
  )
  return entries.length.sum(axis=1).astype(jnp.float32) * one


def physical_bytes(state) -> int:
  """Bytes of all buffers of a state."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
