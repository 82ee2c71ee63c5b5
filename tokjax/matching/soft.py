"""Soft assignments: a token may contribute to several outputs.

All shares are computed in float32, whatever the dtype of the features: what is
rounded to bfloat16 does not add up to one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import scores
from tokjax.plan import Mixture
from tokjax.selection import top_indices


def soft_assignment(
  features: Float[Array, "n d"],
  anchor: Int[Array, "m"],
  *,
  temperature: float,
  relative: bool = False,
  mask: Bool[Array, "n"] | None = None,
  valid: Bool[Array, "m"] | None = None,
) -> Mixture:
  """Many to many: every token spreads over the anchors by similarity.

  Logits are cosine / temperature, membership their softmax over anchors, the
  transform the row-normalised membership; sizes spread by membership and
  `restore` multiplies by its transpose. A reconstruction of Token Transforming
  (its code is not public).

  Args:
    features: what similarity is measured on, `[n, d]`.
    anchor: indices of the m tokens that outputs grow from.
    temperature: towards 0 every token goes to its nearest anchor.
    relative: it is in units of the mean of 1 - cosine between tokens and
      anchors, which differs by a factor of 20 between the blocks of one model.
    mask: padded tokens contribute to nothing.
    valid: False for anchors that this example does not have.
  """
  features = features.astype(jnp.float32)
  similarity = scores.cosine(features[anchor], features)
  if relative:
    pairs = _pairs(similarity, mask, valid)
    temperature = temperature * _mean_distance(1 - similarity, pairs)
  logits = similarity / temperature
  if valid is not None:
    # Finite, because an example may have no anchor at all.
    logits = jnp.where(valid[:, None], logits, jnp.finfo(logits.dtype).min)
  share = jax.nn.softmax(logits, axis=0)
  if mask is not None:
    share = jnp.where(mask[None, :], share, 0.0)
  if valid is not None:
    share = jnp.where(valid[:, None], share, 0.0)
  total = share.sum(axis=-1, keepdims=True)
  weight = share / jnp.where(total > 0, total, 1.0)
  return Mixture(weight, share, share.T, anchor, valid)


def _pairs(
  similarity: Float[Array, "m n"],
  mask: Bool[Array, "n"] | None,
  valid: Bool[Array, "m"] | None,
) -> Bool[Array, "m n"]:
  """Which anchors and tokens are real."""
  pairs = jnp.ones(similarity.shape, bool)
  pairs = pairs if mask is None else pairs & mask[None, :]
  return pairs if valid is None else pairs & valid[:, None]


def _mean_distance(
  distance: Float[Array, "m n"], pairs: Bool[Array, "m n"]
) -> Float[Array, ""]:
  """Over some pairs, without a gradient; a tiny number where all are equal."""
  total = jnp.sum(jnp.where(pairs, jnp.maximum(distance, 0.0), 0.0))
  mean = total / jnp.maximum(pairs.sum(), 1)
  return jax.lax.stop_gradient(jnp.maximum(mean, 1e-9))


def local_soft_kmeans(
  features: Float[Array, "n d"],
  grid: tuple[int, ...],
  cells: tuple[int, ...],
  *,
  iterations: int = 5,
  temperature: float = 0.02,
  relative: bool = False,
  window: int = 5,
  neighbours: int = 20,
  normalise: bool = False,
) -> Mixture:
  """Clusters a grid of tokens into a smaller grid, and can undo it.

  Centres start as the means of the cells (adaptive average pooling) and move
  by soft k-means in which a token only sees the centres of cells within
  window // 2 of its own. `restore` mixes the values of the `neighbours`
  nearest centres. Expedit (Liang et al., 2022; checked against
  hourglass_image_encoder.py and mmseg/ops/{cluster,reconstruction}.py).

  Args:
    features: `[h * w, d]`, row major.
    grid: its sides, of any rank.
    cells: the smaller grid; outputs = their product.
    iterations: soft k-means steps.
    temperature: factor of the squared distance (tau in the paper).
    relative: distances are in units of the mean squared distance between
      tokens and the first centres that they see.
    window: side of the neighbourhood, in cells.
    neighbours: centres mixed by `restore`; ties all count.
    normalise: True makes restore weights sum to one, which preserves
      constants; the official code divides by the L2 norm of the row.
  """
  features = features.astype(jnp.float32)
  pool = _pooling(grid, cells)
  near = _same_neighbourhood(grid, cells, window)
  weight = share = jnp.asarray(pool)
  centre = weight @ features
  if relative:
    distance = scores.squared_distance(centre, features)
    temperature = temperature / _mean_distance(distance, jnp.asarray(near))
  for _ in range(max(iterations, 1)):
    logits = -temperature * scores.squared_distance(centre, features)
    share = jax.nn.softmax(jnp.where(near, logits, -jnp.inf), axis=0)
    share = jax.lax.stop_gradient(share)
    # All of a centre's shares may underflow; it is then zero as in the code.
    weight = share / jnp.maximum(share.sum(axis=-1, keepdims=True), 1e-16)
    centre = weight @ features
  back = nearest_mix(
    features,
    centre,
    temperature=temperature,
    neighbours=neighbours,
    normalise=normalise,
  )
  anchor = jnp.asarray(np.argmax(pool, axis=-1))
  return Mixture(weight, share, back, anchor)


def nearest_mix(
  features: Float[Array, "n d"],
  centre: Float[Array, "m d"],
  *,
  temperature: float | Float[Array, ""],
  neighbours: int,
  normalise: bool = False,
) -> Float[Array, "n m"]:
  """How the nearest centres mix into each token: Expedit's reconstruction.

  Arguments are those of `local_soft_kmeans`; the official code passes the
  features before and the centres after clustering.
  """
  features, centre = (x.astype(jnp.float32) for x in (features, centre))
  closeness = jnp.exp(-temperature * scores.squared_distance(features, centre))
  last = top_indices(closeness, min(neighbours, centre.shape[0]))[:, -1:]
  bound = jnp.take_along_axis(closeness, last, axis=-1)
  mix = jnp.where(closeness >= bound, closeness, 0.0)
  if normalise:
    return mix / jnp.maximum(mix.sum(axis=-1, keepdims=True), 1e-12)
  square = jnp.sum(jnp.square(mix), axis=-1, keepdims=True)
  return mix * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def grid_pool(grid: tuple[int, ...], cells: tuple[int, ...]) -> Mixture:
  """Adaptive average pooling; `restore` gives a token its home cell's value."""
  pool = _pooling(grid, cells)
  share = pool / pool.sum(axis=0, keepdims=True)
  home = _same_neighbourhood(grid, cells, 1).T.astype(np.float32)
  anchor = np.argmax(pool, axis=-1)
  return Mixture(*map(jnp.asarray, (pool, share, home, anchor)))


def cells_of(grid: tuple[int, ...], count: int) -> tuple[int, ...]:
  """The smaller grid of `count` cells whose shape is most like `grid`.

  Raises:
    ValueError: no grid of that many cells fits.
  """
  fits = _factors(count, grid)
  if not fits:
    sides = "x".join(map(str, grid))
    raise ValueError(f"{count} cells: no such grid fits into {sides}")

  def unlike(cells):
    logs = np.log(cells) - np.log(grid)
    return round(float(logs.max() - logs.min()), 12)

  return min(fits, key=unlike)


def _factors(count: int, most: tuple[int, ...]) -> list[tuple[int, ...]]:
  """All sides whose product is `count`, none larger than `most`."""
  if len(most) == 1:
    return [(count,)] if count <= most[0] else []
  return [
    (side, *rest)
    for side in range(1, min(most[0], count) + 1)
    if count % side == 0
    for rest in _factors(count // side, most[1:])
  ]


def _edges(size: int, cells: int) -> list[tuple[int, int]]:
  """Adaptive pooling: cell i covers floor(i s / c) .. ceil((i + 1) s / c)."""
  return [
    (i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)
  ]


def _pooling(grid, cells) -> Float[np.ndarray, "m n"]:
  """The matrix of adaptive average pooling."""
  sides = []
  for size, count in zip(grid, cells, strict=True):
    rows = np.zeros((count, size), np.float32)
    for i, (start, stop) in enumerate(_edges(size, count)):
      rows[i, start:stop] = 1.0 / (stop - start)
    sides.append(rows)
  return functools.reduce(np.kron, sides)


def _same_neighbourhood(grid, cells, window: int) -> Bool[np.ndarray, "m n"]:
  """True where a token's own cell lies within window // 2 of a cell."""
  near = np.ones((1, 1), bool)
  for size, count in zip(grid, cells, strict=True):
    home = np.arange(size) * count // size
    gap = np.abs(np.arange(count)[:, None] - home[None, :])
    near = np.kron(near, gap <= window // 2)
  return near
