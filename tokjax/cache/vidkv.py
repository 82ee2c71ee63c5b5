"""VidKV: keys in 1.5 bits and values in 1.58 (Tao et al., 2025).

Checked against transformers/src/transformers/vidkv_quant.py, cache_utils.py
(0e55c39). Channels of keys that vary most take two bits; the others take one
bit for each of the numbers that their Fourier transform, from channel to
channel, consists of. The transform of D real numbers is D real numbers, since
one half of it mirrors the other; the official code stores both halves.

A step attends before it codes, as in `kivi`: what it makes due is coded by the
next one. Coded entries are coded anew then, together with the exact ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from tokjax import selection
from tokjax.cache import entries as entries_lib
from tokjax.cache import quantisation as few
from tokjax.cache.entries import Entries
from tokjax.layer import Layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded:
  """Keys and values in codes, W of the D channels being the varying ones.

  Attributes:
    channel: the varying channels in order, then the others, `[*b, D]`.
    k_bits: of varying channels, `[*b, cap, W / 8, 2]`; k_low, k_step:
      `[*b, cap / group, W]`.
    k_signs: of the others' transform, `[*b, cap, (D - W) / 8, 1]`; k_scale:
      `[*b, cap / group, D - W]`.
    v_codes: `[*b, cap, D / 5]`; v_scale: `[*b, cap / group, D]`.
  """

  channel: Int[Array, "*b d"]
  k_bits: UInt8[Array, "*b c w8 2"]
  k_low: Float[Array, "*b cg w"]
  k_step: Float[Array, "*b cg w"]
  k_signs: UInt8[Array, "*b c o8 1"]
  k_scale: Float[Array, "*b cg o"]
  v_codes: UInt8[Array, "*b c d5"]
  v_scale: Float[Array, "*b cg d"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VidState:
  """Entries in codes, and the last of them exact.

  Attributes:
    codes: of `coded` entries, a multiple of the group.
    k_rest, v_rest: exact ones, that of place p in row p - coded, `[*b, R, D]`.
    coded: `[*b]`.
    position: `[*b, cap + R]`.
    length: `[*b]`.
  """

  codes: Coded
  k_rest: Float[Array, "*b r d"]
  v_rest: Float[Array, "*b r d"]
  coded: Int[Array, "*b"]
  position: Int[Array, "*b n"]
  length: Int[Array, "*b"]


@functools.cache
def fourier(channels: int) -> tuple[np.ndarray, np.ndarray]:
  """The matrix of a real Fourier transform, and its inverse, `[d, d]`.

  Real parts of the lower half of the frequencies, then imaginary ones, without
  those that are always zero.
  """
  if not channels:
    return (np.zeros((0, 0), np.float32),) * 2
  full = np.fft.rfft(np.eye(channels), axis=1)
  matrix = np.concatenate(
    [full.real, full.imag[:, 1 : (channels + 1) // 2]], axis=1
  )
  back = np.linalg.inv(matrix)
  return matrix.astype(np.float32), back.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class VidKV:
  """Stores rotated keys and values in few bits; see the module.

  Attributes:
    bits: of keys in the mean; `bits - 1` of the channels take two bits.
    group: tokens that share a scale.
    buffer: R, exact tokens from which on all are coded; a multiple of
      `group`.
  """

  bits: float = 1.5
  group: int = 32
  buffer: int = 128

  rotated = True
  reindexed = False
  movable = False

  def __post_init__(self):
    if not 1 <= self.bits <= 2:
      raise ValueError(f"bits={self.bits}: must lie in [1, 2]")
    if self.group < 1 or self.buffer < 1 or self.buffer % self.group:
      raise ValueError(
        f"buffer={self.buffer}, group={self.group}: the group must divide the"
        " buffer"
      )

  def varying(self, channels: int) -> int:
    """How many channels take two bits."""
    return int(channels * (self.bits - 1))

  def check(self, layer: Layer) -> None:
    """Raises where no channel takes the bits that are asked for."""
    if self.bits > 1 and not self.varying(layer.head_dim):
      raise ValueError(
        f"bits={self.bits}: gives none of {layer.head_dim} channels two bits;"
        " use 1 or more bits"
      )

  def pack(self, layer: Layer, entries: Entries, room: int) -> VidState:
    if entries.extra:
      raise ValueError(
        f"VidKV stores keys and values only, not {sorted(entries.extra)}; use"
        " Exact()"
      )
    g, cap = self.group, self.rows(layer, room)
    entries = entries_lib.with_room(entries, max(entries.room, cap) + g)

    def newest(e):
      first = jnp.maximum(e.length // g * g - cap, 0)
      cut = lambda x: jax.lax.dynamic_slice_in_dim(x, first, cap + g)
      return e.map(cut, e.length - first)

    entries = entries_lib.over_heads(newest, entries)
    coded = entries.length // g * g
    cut = lambda x: x[:, :, :cap]
    codes = self.encode(layer, cut(entries.k), cut(entries.v), coded)

    def rest(x, coded):
      exact = jax.lax.dynamic_slice_in_dim(x, coded, g)
      return jnp.pad(exact, [(0, self.buffer - g), (0, 0)])

    over = lambda x: entries_lib.over_heads(rest, x, coded)
    behind = [(0, 0), (0, 0), (0, self.buffer - g)]
    return VidState(
      codes, over(entries.k), over(entries.v), coded,
      jnp.pad(entries.position, behind), entries.length,
    )  # fmt: skip

  def rows(self, layer: Layer, room: int) -> int:
    """Places of codes: whole groups, in a sliding layer those of its window."""
    groups = max(room // self.group, 1)
    if layer.window is not None:
      groups = min(groups, -(-layer.window // self.group))
    return groups * self.group

  def encode(
    self,
    layer: Layer,
    k: Float[Array, "b g n d"],
    v: Float[Array, "b g n d"],
    count: Int[Array, "b g"],
  ) -> Coded:
    """Codes of all entries, of which the first `count` of each head matter."""
    there = jnp.arange(k.shape[2])[None, None] < count[:, :, None]
    channel = jax.vmap(self.by_range)(k, there)
    channel = jnp.broadcast_to(channel[:, None], (*k.shape[:2], k.shape[3]))
    one = functools.partial(self._encoded, layer.dtype)
    return entries_lib.over_heads(one, k, v, channel)

  def by_range(
    self, k: Float[Array, "g n d"], there: Bool[Array, "g n"]
  ) -> Int[Array, "d"]:
    """Channels of one example, those of the largest range first.

    The range is that over all heads together.
    """
    k, there = k.astype(jnp.float32), there[:, :, None]
    low = jnp.where(there, k, jnp.inf).min(axis=(0, 1))
    high = jnp.where(there, k, -jnp.inf).max(axis=(0, 1))
    size = jnp.where(low <= high, high - low, 0.0)
    d = k.shape[-1]
    rank = selection.places(size) < self.varying(d)
    return selection.partition(rank).index

  def _encoded(self, dtype, k, v, channel) -> Coded:
    """One head's codes."""
    n, d = k.shape
    w, groups = self.varying(d), n // self.group
    split = lambda x: x.reshape(groups, self.group, x.shape[-1])
    k = k.astype(jnp.float32)[:, channel]
    wide, plain = split(k[:, :w]), split(k[:, w:] @ fourier(d - w)[0])
    low, step = (x.astype(dtype) for x in few.limits(wide, 2, 1))
    bits = few.encode(wide, low, step, 2).reshape(n, -1)
    signs, scale = few.signs(plain, 1)
    codes, v_scale = few.ternary(split(v.astype(jnp.float32)), 1)
    return Coded(
      channel,
      few.pack(by_eights(bits), 2), low[:, 0], step[:, 0],
      few.pack(by_eights(signs.reshape(n, -1)), 1), scale[:, 0].astype(dtype),
      few.pack_ternary(codes.reshape(n, d)), v_scale[:, 0].astype(dtype),
    )  # fmt: skip

  def _decoded(self, s: Coded) -> tuple[Float[Array, "n d"], ...]:
    """One head's keys and values."""
    n, d = s.k_bits.shape[0], s.channel.shape[0]
    w = self.varying(d)
    split = lambda x: x.reshape(-1, self.group, x.shape[-1])
    each = lambda x: x[:, None]
    bits = split(few.unpack(s.k_bits)[:, :w])
    wide = few.decode(bits, each(s.k_low), each(s.k_step)).reshape(n, w)
    signs = split(few.unpack(s.k_signs)[:, : d - w])
    plain = few.decode(2 * signs - 1, 0 * each(s.k_scale), each(s.k_scale))
    plain = plain.reshape(n, d - w).astype(jnp.float32) @ fourier(d - w)[1]
    k = jnp.concatenate([wide, plain.astype(wide.dtype)], axis=1)
    codes = split(few.unpack_ternary(s.v_codes, d)).astype(jnp.int32)
    v = few.decode(codes - 1, 0 * each(s.v_scale), each(s.v_scale))
    return k[:, jnp.argsort(s.channel)], v.reshape(n, d)

  def append(self, layer, state, k, v, position, valid) -> VidState:
    """Codes everything where the last step left it due; then adds the token."""
    due = valid[:, None] & (state.length - state.coded == self.buffer)
    s = jax.lax.cond(
      due.any(), lambda s: self._recoded(layer, s, due), lambda s: s, state
    )
    at = jnp.where(valid[:, None], s.length - s.coded, self.buffer)
    to = jnp.where(valid[:, None], s.length, s.position.shape[2])
    put = lambda x, at, new: x.at[at].set(new.astype(x.dtype), mode="drop")
    wide = jnp.broadcast_to(position[:, None], s.length.shape)
    return dataclasses.replace(
      s,
      k_rest=entries_lib.over_heads(put, s.k_rest, at, k),
      v_rest=entries_lib.over_heads(put, s.v_rest, at, v),
      position=entries_lib.over_heads(put, s.position, to, wide),
      length=s.length + valid[:, None],
    )

  def _recoded(
    self, layer: Layer, s: VidState, due: Bool[Array, "b g"]
  ) -> VidState:
    """With all entries of the heads that are due in codes.

    The oldest ones go where there is no place; they are out of sight.
    """
    shown = self.view(layer, s)
    cap = s.codes.k_bits.shape[2]
    gone = jnp.where(due, jnp.maximum(s.length - cap, 0), 0)
    cut = lambda x, gone: jax.lax.dynamic_slice_in_dim(x, gone, cap)
    k, v = (entries_lib.over_heads(cut, x, gone) for x in (shown.k, shown.v))
    length = s.length - gone
    new = self.encode(layer, k, v, jnp.where(due, length, 0))

    def pick(new, old):
      return jnp.where(due.reshape(due.shape + (1,) * (old.ndim - 2)), new, old)

    move = lambda x, gone: jnp.roll(x, -gone, axis=0)
    return dataclasses.replace(
      s,
      codes=jax.tree.map(pick, new, s.codes),
      coded=jnp.where(due, length, s.coded),
      position=entries_lib.over_heads(move, s.position, gone),
      length=length,
    )

  def view(self, layer: Layer, state: VidState) -> Entries:
    def one(s):
      k, v = self._decoded(s.codes)
      over = lambda x, rest: jax.lax.dynamic_update_slice_in_dim(
        jnp.pad(x, [(0, self.buffer), (0, 0)]).astype(rest.dtype), rest,
        s.coded, 0,
      )  # fmt: skip
      return over(k, s.k_rest), over(v, s.v_rest)

    k, v = entries_lib.over_heads(one, state)
    return Entries(k, v, state.position, state.length)

  def parts(self, layer: Layer, state: VidState) -> None:
    return None

  def logical(self, layer: Layer, state: VidState) -> Float[Array, "b"]:
    """Codes, scales and exact rows that count, channels and positions."""
    d, size = layer.head_dim, jnp.dtype(layer.dtype).itemsize
    w = self.varying(d)
    row = 2 * -(-w // 8) + -(-(d - w) // 8) + -(-d // 5)
    scales = (2 * w + (d - w) + d) * size / self.group
    exact = state.length - state.coded
    total = state.coded * (row + scales) + exact * 2 * d * size
    total = total + state.length * 4 + d * 4
    return total.sum(axis=1).astype(jnp.float32)


def by_eights(codes: UInt8[Array, "n a"]) -> UInt8[Array, "n b"]:
  """Zeros behind, up to whole bytes."""
  return jnp.pad(codes, [(0, 0), (0, -codes.shape[1] % 8)])
