"""Sparse attention to a prompt, estimated from its own queries and keys."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import layout as layouts
from tokjax import selection
from tokjax.attention import core
from tokjax.attention.causal import Causal
from tokjax.cache import budgets
from tokjax.cache.budgets import Budget
from tokjax.cache.contract import Arrivals, Layer, Memory


@dataclasses.dataclass(frozen=True)
class VerticalSlash(Causal):
  """Whole columns and whole diagonals of attention (MInference).

  The last queries say which: the columns and the distances that hold most of
  their attention. A query sees key j if its column or its distance is chosen.
  Checked against minference/modules/minference_forward.py (fb56c91).

  Attributes:
    vertical, slash: how many columns and distances.
    queries: how many last real queries are looked at.
    sinks, near: first columns and smallest distances that are chosen in any
      case, as far as there is room.
    least_vertical, least_slash: lower bounds of the two numbers.
  """

  vertical: Budget = budgets.Tokens(1000)
  slash: Budget = budgets.Tokens(6096)
  queries: int = 64
  sinks: int = 30
  near: int = 100
  least_vertical: int = 30
  least_slash: int = 50

  @property
  def whole(self) -> bool:
    return True

  def with_keep(self, keep: float) -> "VerticalSlash":
    """Half of that fraction each."""
    half = budgets.Share(keep / 2)
    return dataclasses.replace(self, vertical=half, slash=half)

  def mass(
    self, layer: Layer, arrivals: Arrivals, memory: Memory
  ) -> tuple[Float[Array, "b h n"], Float[Array, "b h n"]]:
    """Attention of the last queries by column and by distance."""
    t = arrivals.q.shape[1]
    length = arrivals.valid.sum(axis=1)
    at = length[:, None] - 1 - jnp.arange(min(self.queries, t))[None]
    real = at >= 0
    at = jnp.maximum(at, 0)
    q = jnp.take_along_axis(arrivals.q, at[:, :, None, None], axis=1)
    place = jnp.take_along_axis(arrivals.position, at, axis=1)
    x = core.logits(
      layer,
      core.split(layer.rotate(q, place), layer.kv_heads),
      core.heads_first(layer.rotate(memory.k, memory.position)),
    )
    seen = core.visible(layer, place, memory.position, memory.valid)
    seen = seen & real[:, :, None]
    p = core.softmax(x, seen[:, None, None])
    p = p.reshape(p.shape[0], layer.heads, *p.shape[3:])

    def by_distance(p, at):
      offset = at[:, None] - jnp.arange(p.shape[-1])[None]
      rows = jnp.take_along_axis(p, jnp.maximum(offset, 0), axis=-1)
      return jnp.where(offset >= 0, rows, 0.0).sum(axis=0)

    slash = jax.vmap(jax.vmap(by_distance, (0, None)))(p, at)
    return p.sum(axis=2), slash

  def chosen(
    self, layer: Layer, arrivals: Arrivals, memory: Memory
  ) -> tuple[Bool[Array, "b h n"], Bool[Array, "b h n"]]:
    """Columns and distances that are seen."""
    vertical, slash = self.mass(layer, arrivals, memory)
    place = jnp.arange(vertical.shape[-1])

    def pick(mass, count, forced, valid):
      score = jnp.where(place < forced, jnp.inf, mass)
      return selection.places(score, mask=valid) < count

    def counts(budget, least):
      of = budgets.counts(budget, layer.index, layer.depth, arrivals.valid)
      return jnp.maximum(of, least)

    over = jax.vmap(jax.vmap(pick, (0, None, None, None)), (0, 0, None, 0))
    return (
      over(
        vertical, counts(self.vertical, self.least_vertical), self.sinks,
        memory.valid,
      ),
      over(
        slash, counts(self.slash, self.least_slash), self.near, memory.valid
      ),
    )  # fmt: skip

  def seen(self, layer, arrivals, memory):
    causal = super().seen(layer, arrivals, memory)
    column, distance = self.chosen(layer, arrivals, memory)

    def rows(at):
      offset = at[:, None] - jnp.arange(column.shape[-1])[None]
      slash = distance[:, :, jnp.maximum(offset, 0)]
      return causal(at) & (column[:, :, None] | slash)

    return rows


@dataclasses.dataclass(frozen=True)
class Antidiagonal(Causal):
  """Blocks of keys whose antidiagonals hold the mass of attention (XAttention).

  Each tile of `stride` x `stride` products is judged by the sum of its
  antidiagonal; the softmax of those sums over the tiles of a row, summed over
  blocks, is what a share `mass` is chosen of. The first block and the query's
  own are forced. Checked against xattn/src/Xattention.py, utils.py (e379887).

  Attributes:
    mass: share of the estimated attention.
    stride: side of a tile; the block is a multiple of it.
    block: tokens a block of queries or keys.
    norm: further divisor of the sums.
  """

  mass: float = 0.9
  stride: int = 8
  block: int = 128
  norm: float = 1.0

  def __post_init__(self):
    if self.stride < 1 or self.block % self.stride:
      raise ValueError(
        f"block={self.block}, stride={self.stride}: the stride must divide the"
        " block"
      )
    if not 0 < self.mass <= 1:
      raise ValueError(f"mass={self.mass}: must lie in (0, 1]")

  @property
  def whole(self) -> bool:
    return True

  def estimate(
    self, layer: Layer, arrivals: Arrivals, memory: Memory
  ) -> Float[Array, "b h m m"]:
    """Estimated attention of each block of queries to each block of keys."""
    s, g = self.stride, layer.kv_heads
    q = core.split(layer.rotate(arrivals.q, arrivals.position), g)
    k = core.heads_first(layer.rotate(memory.k, memory.position))
    q = jnp.where(arrivals.valid[:, None, None, :, None], q, 0.0)
    k = jnp.where(memory.valid[:, None, :, None], k, 0.0)
    tiles = lambda x: _padded(x, self.block, axis=-2).reshape(
      *x.shape[:-2], -1, s, x.shape[-1]
    )
    x = jnp.einsum(
      "bgrcsd,bgesd->bgrce", tiles(q)[..., ::-1, :], tiles(k),
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    x = x * (layer.factor / s / self.norm)
    real = _padded(memory.valid, self.block, axis=1)
    real = real.reshape(real.shape[0], -1, s).any(axis=-1)
    place = jnp.arange(real.shape[1])
    seen = (place[:, None] >= place[None])[None] & real[:, None, :]
    seen = seen & real[:, :, None]
    p = core.softmax(x, seen[:, None, None])
    m, per = p.shape[-1] * s // self.block, self.block // s
    p = p.reshape(p.shape[0], layer.heads, m, per, m, per)
    return p.sum(axis=(3, 5))

  def blocks(
    self, layer: Layer, arrivals: Arrivals, memory: Memory
  ) -> Bool[Array, "b h m m"]:
    """Which blocks of keys each block of queries sees."""
    mass = self.estimate(layer, arrivals, memory)
    place = jnp.arange(mass.shape[-1])

    def pick(mass, row):
      forced = (place == 0) | (place == row)
      return selection.top_mass(
        mass, self.mass, forced=forced, mask=place <= row
      )

    over = jax.vmap(pick)
    return jax.vmap(jax.vmap(over, (0, None)), (0, None))(mass, place)

  def layout(self, layer, arrivals, memory):
    if layer.window is not None:
      return None
    blocks = self.blocks(layer, arrivals, memory)
    place = jnp.arange(blocks.shape[-1])
    own = (place[:, None] == place[None])[None, None]
    kinds = jnp.where(own, jnp.int8(1), jnp.int8(2))
    return layouts.from_kinds(
      jnp.where(blocks, kinds, jnp.int8(0)),
      block_q=self.block,
      block_k=self.block,
      q_len=arrivals.q.shape[1],
      k_len=memory.k.shape[1],
      mask_fn=layouts.Causal(),
      partial_capacity=2,
    )

  def seen(self, layer, arrivals, memory):
    causal = super().seen(layer, arrivals, memory)
    blocks = self.blocks(layer, arrivals, memory)
    n = memory.k.shape[1]

    def rows(at):
      wide = jnp.repeat(blocks[:, :, at // self.block], self.block, axis=-1)
      return causal(at) & wide[..., :n]

    return rows


def _padded(x: Array, block: int, axis: int) -> Array:
  """Zeros behind, up to whole blocks."""
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, -x.shape[axis] % block)
  return jnp.pad(x, pad)
