"""Tokens coded in two precisions, and a buffer of exact ones: ZipCache's store.

All functions are those of one key head.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from tokjax import selection
from tokjax.cache import entries as entries_lib
from tokjax.cache import quantisation as few
from tokjax.layer import Layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tier:
  """Coded tokens of one precision, written in batches.

  Keys share lowest values and steps by channel within a batch; values are
  divided by a channel scale of their batch, then coded token by token.

  Attributes:
    k_bits, v_bits: `[*b, c, D / 8, B]`.
    k_low, k_step: `[*b, batches, D]`.
    v_low, v_step: `[*b, c, 1]`.
    batch: each token's, `[*b, c]`.
    position: in the text, `[*b, c]`.
    length: tokens that count, `[*b]`.
  """

  k_bits: UInt8[Array, "*b c d8 bits"]
  v_bits: UInt8[Array, "*b c d8 bits"]
  k_low: Float[Array, "*b m d"]
  k_step: Float[Array, "*b m d"]
  v_low: Float[Array, "*b c 1"]
  v_step: Float[Array, "*b c 1"]
  batch: Int[Array, "*b c"]
  position: Int[Array, "*b c"]
  length: Int[Array, "*b"]

  @classmethod
  def empty(cls, layer: Layer, bits: int, room: int, batches: int) -> "Tier":
    """One head's tier."""
    d = layer.head_dim
    code = jnp.zeros((room, d // 8, bits), jnp.uint8)
    scale = jnp.zeros((batches, d), layer.dtype)
    own = jnp.zeros((room, 1), layer.dtype)
    index = jnp.zeros((room,), jnp.int32)
    return cls(code, code, scale, scale, own, own, index, index, jnp.int32(0))

  def add(
    self,
    k: Float[Array, "n d"],
    v: Float[Array, "n d"],
    position: Int[Array, "n"],
    batch: Int[Array, ""],
    pick: selection.Selection,
  ) -> "Tier":
    """One head's tier with the picked rows as a batch.

    Where there is no room left, they replace the oldest rows.

    Args:
      k: keys.
      v: values over the channel scale.
      position: of the rows.
      batch: where its scales go.
      pick: rows, valid ones first.
    """
    bits, dtype = self.k_bits.shape[-1], self.k_low.dtype
    k, v, position = (x[pick.index] for x in (k, v, position))
    low, step = few.limits(k, bits, 0, pick.valid[:, None])
    low, step = low.astype(dtype), step.astype(dtype)
    v_low, v_step = few.limits(v, bits, 1)
    v_low, v_step = v_low.astype(dtype), v_step.astype(dtype)
    room, m = self.batch.shape[0], pick.index.shape[0]
    at = entries_lib.places_for(m, self.position, self.valid)
    at = jnp.where(pick.valid, at, room)
    put = lambda x, rows: x.at[at].set(rows.astype(x.dtype), mode="drop")
    code = lambda x, low, step: few.pack(few.encode(x, low, step, bits), bits)
    return Tier(
      put(self.k_bits, code(k, low, step)),
      put(self.v_bits, code(v, v_low, v_step)),
      self.k_low.at[batch].set(low[0]),
      self.k_step.at[batch].set(step[0]),
      put(self.v_low, v_low),
      put(self.v_step, v_step),
      put(self.batch, jnp.full(at.shape, batch)),
      put(self.position, position),
      jnp.minimum(self.length + pick.total, room),
    )

  def rows(
    self, scale: Float[Array, "m d"]
  ) -> tuple[Float[Array, "c d"], Float[Array, "c d"]]:
    """One head's keys and values, decoded."""
    low, step = self.k_low[self.batch], self.k_step[self.batch]
    k = few.decode(few.unpack(self.k_bits), low, step)
    v = few.decode(few.unpack(self.v_bits), self.v_low, self.v_step)
    return k, v * scale[self.batch]

  @property
  def valid(self) -> Bool[Array, "*b c"]:
    shape = self.batch.shape
    place = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    return place < self.length[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiers:
  """The state: two tiers, value scales by batch, and the exact buffer.

  Attributes:
    salient, other: the tiers.
    scale: of value channels, `[*b, batches, D]`.
    k, v, position: of the buffer, `[*b, gap, ...]`.
    length: tokens in the buffer, `[*b]`.
    batches: that were coded so far, `[*b]`; number i has row i of `scale` and
      of the tiers' scales, in a sliding layer i modulo the number of rows.
  """

  salient: Tier
  other: Tier
  scale: Float[Array, "*b m d"]
  k: Float[Array, "*b gap d"]
  v: Float[Array, "*b gap d"]
  position: Int[Array, "*b gap"]
  length: Int[Array, "*b"]
  batches: Int[Array, "*b"]

  def coded(
    self,
    k: Float[Array, "n d"],
    v: Float[Array, "n d"],
    position: Int[Array, "n"],
    valid: Bool[Array, "n"],
    score: Float[Array, "n"],
    few_of: Int[Array, ""] | int,
  ) -> "Tiers":
    """One head's state with rows coded: all but the `few_of` worst salient."""
    n = valid.shape[0]
    total = valid.sum(dtype=jnp.int32)
    top = selection.top_k(score, n, mask=valid, count=total - few_of)
    salient = jnp.zeros((n,), bool).at[top.index].max(top.valid)
    peak = jnp.where(valid[:, None], jnp.abs(v), 0.0).max(axis=0)
    scale = jnp.sqrt(jnp.where(peak > 0, peak, 1.0)).astype(self.scale.dtype)
    at = self.batches % self.scale.shape[0]
    over = v / scale[None]
    room = lambda tier: min(tier.batch.shape[0], n)
    of = lambda tier, stays: tier.add(
      k, over, position, at, selection.of_mask(stays & valid, room(tier))
    )
    return dataclasses.replace(
      self,
      salient=of(self.salient, salient),
      other=of(self.other, ~salient),
      scale=self.scale.at[at].set(scale),
      length=jnp.zeros_like(self.length),
      batches=self.batches + 1,
    )
