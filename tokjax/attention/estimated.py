"""Sparse attention to a prompt, estimated from its own queries and keys."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import layout as layouts
from tokjax import budgets, selection
from tokjax.attention import core, estimators
from tokjax.attention.causal import Causal, listed, with_others
from tokjax.budgets import Budget
from tokjax.layer import Arrivals, Layer, Memory


@dataclasses.dataclass(frozen=True)
class VerticalSlash(Causal):
  """Whole columns and whole diagonals of attention (MInference).

  The last queries say which: the columns and the distances that hold most of
  their attention. A query sees key j if its column is chosen, or a distance
  between the blocks that the two are in. Checked against
  minference/modules/minference_forward.py (fb56c91), whose kernel widens
  distances to blocks too.

  Attributes:
    vertical, slash: how many columns and distances.
    queries: how many last real queries are looked at.
    sinks, near: first columns and smallest distances that are chosen in any
      case, as far as there is room.
    least_vertical, least_slash: lower bounds of the two numbers.
    block: tokens that distances are widened to; 1: not at all, and then no
      block of attention can be skipped.
  """

  vertical: Budget = budgets.Count(1000)
  slash: Budget = budgets.Count(6096)
  queries: int = 64
  sinks: int = 30
  near: int = 100
  least_vertical: int = 30
  least_slash: int = 50
  block: int = 128

  def __post_init__(self):
    if self.block < 1:
      raise ValueError(f"block={self.block}: must be 1 or more")

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
      of = budgets.counts(budget, layer, arrivals.valid)
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

  def slashes(self, distance: Bool[Array, "b h n"]) -> Bool[Array, "b h m"]:
    """Whether a distance that occurs between blocks so far apart is chosen.

    Those between blocks d apart are d * block - (block - 1) to
    d * block + (block - 1).
    """
    some = _padded(distance, self.block, axis=-1)
    some = some.reshape(*some.shape[:-1], -1, self.block)
    below = jnp.pad(some[..., :-1, 1:].any(axis=-1), [(0, 0), (0, 0), (1, 0)])
    return some.any(axis=-1) | below

  def seen(self, layer, arrivals, memory):
    causal = super().seen(layer, arrivals, memory)
    column, distance = self.chosen(layer, arrivals, memory)
    slash = self.slashes(distance)

    def rows(at):
      place = jnp.arange(column.shape[-1])
      apart = _apart(at[:, None], place[None], self.block)
      return causal(at) & (column[:, :, None] | slash[:, :, apart])

    return rows

  def layout(self, layer, arrivals, memory):
    """Blocks that slashes touch; columns are read separately."""
    if layer.window is not None or self.block == 1:
      return None
    _, distance = self.chosen(layer, arrivals, memory)
    slash = self.slashes(distance)
    place = jnp.arange(slash.shape[-1])
    blocks = slash[..., _apart(place[:, None], place[None], 1)]
    past = (place[:, None] >= place[None])[None, None]
    return causal_blocks(blocks & past, self.block, arrivals, memory)

  def by_blocks(self, layer, layout, arrivals, memory):
    found = listed(layer, layout, arrivals, memory)
    return with_others(found, self._columns(layer, arrivals, memory))

  def _columns(self, layer, arrivals, memory):
    """Attention to the chosen columns outside of the blocks, with its lse."""
    # The same as in `layout`: the compiler computes it once.
    column, distance = self.chosen(layer, arrivals, memory)
    slash, t = self.slashes(distance), arrivals.q.shape[1]
    most = layer.ask(budgets.table, self.vertical, t).max()
    room = min(max(int(most), self.least_vertical), t)
    pick = jax.vmap(jax.vmap(lambda x: selection.top_k(x, room, mask=x > 0)))(
      column.astype(jnp.float32)
    )
    rotated = layer.rotate(memory.k, memory.position)
    k, v = (
      jnp.take_along_axis(
        jnp.repeat(core.heads_first(x), layer.group, axis=1),
        pick.index[..., None], axis=2,
      )
      for x in (rotated, memory.v)
    )  # fmt: skip
    q = core.split(layer.rotate(arrivals.q, arrivals.position), layer.heads)

    def rows(at):
      query, key = at[None, None, :, None], pick.index[:, :, None]
      apart = _apart(query, key, self.block)
      again = jnp.take_along_axis(slash[:, :, None], apart, axis=-1)
      early = (key <= query) & pick.valid[:, :, None]
      seen = (early & ~again)[:, :, None]
      out, lse = core.part(core.logits(layer, q[:, :, :, at], k), seen, v)
      return core.join(out), jnp.swapaxes(lse[:, :, 0], 1, 2)

    out, lse = core.over_rows(rows, t)
    return out, jnp.swapaxes(lse, 1, 2)


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
    # Estimators scale products by D ** -0.5.
    scale = layer.factor * layer.head_dim**0.5 / self.norm
    q = layer.rotate(arrivals.q, arrivals.position) * scale
    k = layer.rotate(memory.k, memory.position)

    def one(q, k, asked, there):
      given = estimators.Blocked(
        q=q, k=k, block_q=self.block, block_k=self.block, q_mask=asked,
        k_mask=there, pattern=layouts.Causal(),
      )  # fmt: skip
      return jnp.exp(estimators.antidiagonal(given, stride=self.stride))

    first = core.heads_first
    return jax.vmap(one)(first(q), first(k), arrivals.valid, memory.valid)

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
    return causal_blocks(blocks, self.block, arrivals, memory)

  def seen(self, layer, arrivals, memory):
    causal = super().seen(layer, arrivals, memory)
    blocks = self.blocks(layer, arrivals, memory)
    n = memory.k.shape[1]

    def rows(at):
      wide = jnp.repeat(blocks[:, :, at // self.block], self.block, axis=-1)
      return causal(at) & wide[..., :n]

    return rows


def causal_blocks(
  blocks: Bool[Array, "b h m m"],
  block: int,
  arrivals: Arrivals,
  memory: Memory,
) -> layouts.BlockLayout:
  """The layout of some blocks on and below the diagonal, which is partial."""
  place = jnp.arange(blocks.shape[-1])
  own = (place[:, None] == place[None])[None, None]
  kinds = jnp.where(own, jnp.int8(1), jnp.int8(2))
  return layouts.from_kinds(
    jnp.where(blocks, kinds, jnp.int8(0)),
    block_q=block,
    block_k=block,
    q_len=arrivals.q.shape[1],
    k_len=memory.k.shape[1],
    mask_fn=layouts.Causal(),
    partial_capacity=2,
  )


def _apart(
  q: Int[Array, "*#c"], k: Int[Array, "*#c"], block: int
) -> Int[Array, "*c"]:
  """How many blocks keys lie before queries; 0 for those behind."""
  return jnp.maximum(q // block - k // block, 0)


def _padded(x: Array, block: int, axis: int) -> Array:
  """Zeros behind, up to whole blocks."""
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, -x.shape[axis] % block)
  return jnp.pad(x, pad)
