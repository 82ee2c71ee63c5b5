"""What the forward and the backward kernel share: decays, tiles, states.

Powers of the decay that full tiles have in common are computed once a cell.
The last tile of a sequence may hold fewer tokens, the others being zeros: only
tokens that are there decay the state.
"""

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.tpu_plan import LANES
from pallas_kernels.walks import tpu_tiles

_HIGHEST = ("highest", lax.Precision.HIGHEST)


def scratch(plan):
  """Memory of `Decays`."""
  lanes = pltpu.VMEM((plan.tile, LANES), jnp.float32)
  return [pltpu.VMEM((plan.tile, plan.tile), jnp.float32), lanes, lanes]


def lags(shape):
  """How far tokens of the rows are behind those of the columns, float32."""
  row, column = (lax.broadcasted_iota(jnp.int32, shape, n) for n in (0, 1))
  return (row - column).astype(jnp.float32)


def places(plan):
  """Number of each token in its tile, `[tile, 128]` float32."""
  shape = (plan.tile, LANES)
  return lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.float32)


class Decays:
  """Powers of one head's decay factor w in one cell.

  Attributes:
    weights: reference `[tile, tile]`, scale * w ** (i - j), 0 before.
    since: reference `[tile, 128]`, scale * w ** (i + 1), every lane alike.
    until: reference `[tile, 128]`, w to the number of tokens that follow i in
      the tile.
  """

  def __init__(self, plan, log_decay, scale, refs):
    self._plan, self._log = plan, log_decay
    self.weights, self.since, self.until = refs
    lag = lags((plan.tile, plan.tile))
    power = jnp.exp(log_decay * jnp.maximum(lag, 0))
    self.weights[...] = jnp.where(lag >= 0, scale * power, 0)
    self.since[...] = scale * jnp.exp(log_decay * (places(plan) + 1))
    self._write_until(jnp.float32(plan.tile))

  def _write_until(self, held):
    self.until[...] = jnp.exp(self._log * following(self._plan, held))

  def enter(self, tile):
    """Prepares for a tile, by its number in the sequence.

    Returns:
      The number of tokens that the tile holds, float32.
    """
    plan = self._plan
    if plan.length % plan.tile == 0:
      return jnp.float32(plan.tile)
    held = jnp.minimum(plan.length - tile * plan.tile, plan.tile)
    held = held.astype(jnp.float32)

    # Either walk passes from a full tile to the ragged one, or back.
    @pl.when(tile >= plan.tiles - 2)
    def _():
      self._write_until(held)

    return held

  def whole(self, held, width):
    """w to the number of tokens of a tile, `[1, width]`."""
    power = jnp.exp(jnp.full((1, LANES), self._log * held, jnp.float32))
    return tpu_tiles.spread(power, width)


def following(plan, held):
  """Tokens that follow each token of a tile, `[tile, 128]` float32."""
  return jnp.maximum(held - 1 - places(plan), 0)


class Tiles:
  """Reads and multiplies the tiles of a cell.

  Products take what q, k and v are, with states and weighted tokens rounded to
  it, unless the highest precision asks for float32 throughout.

  Attributes:
    count: number of tiles of the cell that are in the sequence.
    dtype: of the factors of products.
  """

  def __init__(self, plan, params, cell, dtype):
    self._plan, self._precision = plan, params.precision
    self._first = cell * plan.together
    self.count = jnp.minimum(plan.together, plan.tiles - self._first)
    self.dtype = jnp.float32 if params.precision in _HIGHEST else dtype

  def at(self, n):
    """Number in the sequence, and rows, of the cell's tile n."""
    start = pl.multiple_of(n * self._plan.tile, self._plan.tile)
    return self._first + n, pl.ds(start, self._plan.tile)

  def factor(self, x):
    return x.astype(self.dtype)

  def product(self, a, b, axis_a, axis_b):
    """Product of two factors over one axis of each, in float32."""
    a, b = self.factor(a), self.factor(b)
    return tpu_tiles.product(a, b, axis_a, axis_b, self._precision)

  def scaled(self, x, column):
    """Rows of x times what is in all lanes of a column `[tile, 128]`."""
    return x.astype(jnp.float32) * tpu_tiles.spread(column, x.shape[1])

  def after(self, decays, held, state, k, v):
    """The state after a tile, from that before it."""
    new = self.product(self.scaled(k, decays.until[...]), v, 0, 0)
    return decays.whole(held, state.shape[1]) * state + new
