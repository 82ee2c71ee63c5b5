"""KIVI: keys in few bits by channel, values by token (Liu et al., 2024).

Checked against models/llama_kivi.py and quant/new_pack.py (876b4d2). All
functions are those of one key head, lifted over heads and examples.

In a sliding layer codes are a ring of whole blocks of R, of at least one more
than the window fills: the token at place p is in row p modulo its length.

A step attends before it codes: the query sees its own token and up to R others
exactly. What a step makes due for coding is therefore coded by the next one,
before that step's token is added.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from tokjax.cache import entries as entries_lib
from tokjax.cache import quantisation as few
from tokjax.cache.entries import Entries
from tokjax.cache.stores import Parts
from tokjax.layer import Layer

# Entries that are decoded at a time, about, when all are read.
PART = 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
  """Entries in few bits, and the last of them exact.

  R is the size of the residual. A prompt of N tokens leaves N // R * R coded
  keys and max(N - R, 0) coded values; a step leaves up to R exact keys and
  R + 1 exact values.

  Attributes:
    k_bits: `[*b, cap, D / 8, B]`; k_low, k_step: `[*b, cap / group, D]`.
    k_rest: exact keys, the one of place p in row p - k_coded, `[*b, R, D]`.
    k_coded: how many keys are coded, a multiple of R, `[*b]`.
    v_bits: `[*b, cap', D / 8, B]`; v_low, v_step: `[*b, cap', D / group]`.
    v_rest: exact values, that of place p in row p - v_coded, `[*b, R + 1, D]`.
    v_coded: how many values are coded, `[*b]`.
    position: `[*b, room]`.
    length: entries that came in, in a ring more than there are rows, `[*b]`.
  """

  k_bits: UInt8[Array, "*b c d8 bits"]
  k_low: Float[Array, "*b cg d"]
  k_step: Float[Array, "*b cg d"]
  k_rest: Float[Array, "*b r d"]
  k_coded: Int[Array, "*b"]
  v_bits: UInt8[Array, "*b e d8 bits"]
  v_low: Float[Array, "*b e dg"]
  v_step: Float[Array, "*b e dg"]
  v_rest: Float[Array, "*b r1 d"]
  v_coded: Int[Array, "*b"]
  position: Int[Array, "*b n"]
  length: Int[Array, "*b"]


@dataclasses.dataclass(frozen=True)
class Kivi:
  """Stores rotated keys and values in `bits` bits; see the module.

  Attributes:
    bits: of a code.
    group: tokens (keys) or channels (values) that share a scale.
    residual: R, the tokens that stay exact; a multiple of `group`.
  """

  bits: int = 2
  group: int = 32
  residual: int = 128

  rotated = True
  reindexed = False
  movable = False

  def __post_init__(self):
    few.check_bits(self.bits)
    if self.group < 1 or self.residual < 1 or self.residual % self.group:
      raise ValueError(
        f"residual={self.residual}, group={self.group}: the group must divide"
        " the residual"
      )

  def check(self, layer: Layer) -> None:
    """Channels have to fill groups and bytes."""
    if layer.head_dim % self.group or layer.head_dim % 8:
      raise ValueError(
        f"heads of {layer.head_dim} channels are no multiple of the"
        f" group={self.group} and of 8; use a group that divides them"
      )

  def pack(self, layer: Layer, entries: Entries, room: int) -> Packed:
    if entries.extra:
      raise ValueError(
        f"Kivi stores keys and values only, not {sorted(entries.extra)}; use"
        " Exact()"
      )
    r, ring = self.residual, self.ring(layer)
    count, size = self.parts_of(room)
    coded, later = count * size, count * size if count > 1 else max(room - r, 1)
    if ring is not None and room >= ring:
      room = coded = later = ring
    entries = entries_lib.with_room(entries, max(room, coded + r) + 1)

    def one(e):
      k_bits, k_low, k_step = self.coded_keys(e.k[:coded], layer.dtype)
      v_bits, v_low, v_step = self.coded_values(e.v[:later], layer.dtype)
      rest = jax.lax.dynamic_slice_in_dim
      k_coded, v_coded = e.length // r * r, jnp.maximum(e.length - r, 0)
      return Packed(
        k_bits, k_low, k_step, rest(e.k, k_coded, r), k_coded,
        v_bits, v_low, v_step, rest(e.v, v_coded, r + 1), v_coded,
        e.position[:room], e.length,
      )  # fmt: skip

    return entries_lib.over_heads(one, entries)

  def ring(self, layer: Layer) -> int | None:
    """Rows of a sliding layer's codes, where it needs no more."""
    if layer.window is None:
      return None
    return (-(-layer.window // self.residual) + 1) * self.residual

  def rings(self, layer: Layer, state: Packed) -> bool:
    """Whether new codes may replace the oldest ones."""
    return self.ring(layer) == state.position.shape[-1]

  def parts_of(self, room: int) -> tuple[int, int]:
    """In how many parts that many entries are read, and entries of a part."""
    blocks = max(room // self.residual, 1)
    count = -(-blocks * self.residual // PART)
    return count, -(-blocks // count) * self.residual

  def coded_keys(self, k: Float[Array, "n d"], dtype):
    """Groups of tokens, channel by channel."""
    n, d = k.shape
    x = k.astype(jnp.float32).reshape(n // self.group, self.group, d)
    low, step = (y.astype(dtype) for y in few.limits(x, self.bits, 1))
    codes = few.encode(x, low, step, self.bits).reshape(n, d)
    return few.pack(codes, self.bits), low[:, 0], step[:, 0]

  def coded_values(self, v: Float[Array, "n d"], dtype):
    """Groups of channels, token by token."""
    n, d = v.shape
    x = v.astype(jnp.float32).reshape(n, d // self.group, self.group)
    low, step = (y.astype(dtype) for y in few.limits(x, self.bits, 2))
    codes = few.encode(x, low, step, self.bits).reshape(n, d)
    return few.pack(codes, self.bits), low[:, :, 0], step[:, :, 0]

  def append(self, layer, state, k, v, position, valid) -> Packed:
    """Codes what the last step left to be coded, then adds the token exact."""

    ring = self.rings(layer, state)

    def one(s, k, v, position, valid):
      s, n = self._coded(layer, s, valid, ring), s.length
      place = n % s.position.shape[0] if ring else n
      put = lambda x, at, row: _put(x, jnp.where(valid, at, x.shape[0]), row)
      return dataclasses.replace(
        s,
        k_rest=put(s.k_rest, n - s.k_coded, k),
        v_rest=put(s.v_rest, n - s.v_coded, v),
        position=put(s.position, place, position),
        length=n + valid,
      )

    wide = lambda x: jnp.broadcast_to(x[:, None], k.shape[:2])
    return entries_lib.over_heads(one, state, k, v, wide(position), wide(valid))

  def _coded(
    self, layer: Layer, s: Packed, valid: Array, ring: bool
  ) -> Packed:
    """One head's state with a full key buffer and an old value coded."""
    r, g, n = self.residual, self.group, s.length
    row = lambda place, x: place % x.shape[0] if ring else place
    # Both are computed in every step, and dropped where they are not due.
    bits, low, step = self.coded_keys(s.k_rest, layer.dtype)
    full = valid & (n - s.k_coded == r)
    at = jnp.where(full, row(s.k_coded, s.k_bits), s.k_bits.shape[0])
    old = self.coded_values(s.v_rest[:1], layer.dtype)
    over = valid & (n - s.v_coded > r)
    to = jnp.where(over, row(s.v_coded, s.v_bits), s.v_bits.shape[0])
    return dataclasses.replace(
      s,
      k_bits=_rows(s.k_bits, at, bits),
      k_low=_rows(s.k_low, at // g, low),
      k_step=_rows(s.k_step, at // g, step),
      k_coded=s.k_coded + jnp.where(full, r, 0),
      v_bits=_rows(s.v_bits, to, old[0]),
      v_low=_rows(s.v_low, to, old[1]),
      v_step=_rows(s.v_step, to, old[2]),
      v_rest=jnp.where(over, jnp.roll(s.v_rest, -1, axis=0), s.v_rest),
      v_coded=s.v_coded + over,
    )

  def view(self, layer: Layer, state: Packed) -> Entries:
    r, n = self.residual, state.position.shape[-1]
    if self.rings(layer, state):
      return self._view_ring(state)
    # Whole blocks, and room for the exact rows wherever they are laid.
    room = (-(-n // r) + 1) * r

    def one(s):
      k, v = self._decoded(_filled(s, room, self.group))
      return (
        _over(k, s.k_rest, s.k_coded),
        _over(v, s.v_rest, s.v_coded),
        _full(s.position, room),
      )

    k, v, position = entries_lib.over_heads(one, state)
    return Entries(k, v, position, state.length)

  def _view_ring(self, state: Packed) -> Entries:
    """Exact rows laid over the codes; a block of keys never crosses the end."""
    n = state.position.shape[-1]

    def one(s):
      k, v = self._decoded(s)
      at = (s.v_coded + jnp.arange(s.v_rest.shape[0])) % n
      v = v.at[at].set(s.v_rest.astype(v.dtype))
      return _over(k, s.k_rest, s.k_coded % n), v, s.position

    k, v, position = entries_lib.over_heads(one, state)
    return Entries(k, v, position, jnp.minimum(state.length, n))

  def parts(self, layer: Layer, state: Packed) -> Parts | None:
    """The coded entries in parts, and the last R + 1 ones."""
    if self.rings(layer, state):
      return None
    count, size = self.parts_of(state.position.shape[-1])
    if count == 1:
      return None
    coded = jnp.maximum(state.length - self.residual - 1, 0)
    behind = max(count * size - state.position.shape[-1], 0)
    places = jnp.pad(state.position, [(0, 0), (0, 0), (0, behind)])

    def part(i):
      of = lambda s: self._decoded(_rows_of(s, i * size, size, self.group))
      k, v = entries_lib.over_heads(of, state)
      position = jax.lax.dynamic_slice_in_dim(places, i * size, size, 2)
      return Entries(k, v, position, jnp.clip(coded - i * size, 0, size))

    return Parts(count, part, entries_lib.over_heads(self._newest, state))

  def _newest(self, s: Packed) -> Entries:
    """One head's last R + 1 entries, exact as far as they are stored so."""
    r, g = self.residual, self.group
    at = jnp.maximum(s.length - r - 1, 0) + jnp.arange(r + 1)
    scales = (x[at // g] for x in (s.k_low, s.k_step))
    k = few.decode(few.unpack(s.k_bits[at]), *scales)
    v = few.unpack(s.v_bits[at]).reshape(r + 1, -1, g)
    v = few.decode(v, s.v_low[at][:, :, None], s.v_step[at][:, :, None])

    def exact(coded, rest, since):
      row = at - since
      rest = rest[jnp.clip(row, 0, rest.shape[0] - 1)]
      return jnp.where(row[:, None] >= 0, rest, coded)

    return Entries(
      exact(k, s.k_rest, s.k_coded),
      exact(v.reshape(k.shape), s.v_rest, s.v_coded),
      s.position[at],
      jnp.minimum(s.length, r + 1),
    )

  def _decoded(self, s: Packed) -> tuple[Float[Array, "n d"], ...]:
    """One head's coded keys and values."""
    n, d = s.k_bits.shape[0], s.k_rest.shape[-1]
    k = few.unpack(s.k_bits).reshape(-1, self.group, d)
    k = few.decode(k, s.k_low[:, None], s.k_step[:, None])
    v = few.unpack(s.v_bits).reshape(n, -1, self.group)
    v = few.decode(v, s.v_low[:, :, None], s.v_step[:, :, None])
    return k.reshape(n, d), v.reshape(n, d)

  def logical(self, layer: Layer, state: Packed) -> Float[Array, "b"]:
    """Codes, scales and exact rows that count, and positions."""
    d, size = layer.head_dim, jnp.dtype(layer.dtype).itemsize
    held = jnp.minimum(state.length, state.position.shape[-1])
    exact = 2 * state.length - state.k_coded - state.v_coded
    code = d * self.bits / 8 + 2 * d / self.group * size
    total = (2 * held - exact) * code + exact * d * size
    total = total + held * 4
    return total.sum(axis=1).astype(jnp.float32)


def _put(x: Array, at: Array, row: Array) -> Array:
  """One row; beyond the end nothing is written."""
  return x.at[at].set(jnp.asarray(row, x.dtype), mode="drop")


def _rows(x: Array, at: Array, rows: Array) -> Array:
  """Several rows from `at` on; what falls beyond the end is dropped."""
  return x.at[at + jnp.arange(rows.shape[0])].set(
    rows.astype(x.dtype), mode="drop"
  )


def _of_codes(
  fn: Callable[[Array, int], Array], s: Packed, group: int
) -> Packed:
  """`fn(array, tokens a row)` of all codes and scales."""
  tokens = dict.fromkeys(("k_bits", "v_bits", "v_low", "v_step"), 1)
  tokens.update(k_low=group, k_step=group)
  new = {name: fn(getattr(s, name), t) for name, t in tokens.items()}
  return dataclasses.replace(s, **new)


def _filled(s: Packed, room: int, group: int) -> Packed:
  """With codes of `room` entries: filling these up moves less than others."""
  return _of_codes(lambda x, tokens: _full(x, room // tokens), s, group)


def _rows_of(s: Packed, at: Array, size: int, group: int) -> Packed:
  """With the codes of `size` entries from `at` on."""

  def cut(x, tokens):
    return jax.lax.dynamic_slice_in_dim(x, at // tokens, size // tokens)

  return _of_codes(cut, s, group)


def _full(x: Array, rows: int) -> Array:
  """`x` with zeros behind, that many rows in all."""
  return jnp.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def _over(coded: Array, rest: Array, at: Array) -> Array:
  """`rest` laid over `coded` from row `at` on."""
  rest = rest.astype(coded.dtype)
  return jax.lax.dynamic_update_slice_in_dim(coded, rest, at, 0)
