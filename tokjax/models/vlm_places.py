"""Where visual tokens are: in blocks of patches, and on axes of positions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from tokjax.tokens import Kind, Tokens


def merged(tokens: Tokens, grid: tuple[int, int], merge: int) -> Tokens:
  """Blocks of patches as tokens, their features next to each other, row by row.

  Each is of size one; positions are rows and columns of blocks.

  Args:
    tokens: all patches of a grid, `[k, rows * columns, d]`.
    grid: rows and columns.
    merge: patches on a side of a block.
  """
  (k, _, d), (rows, columns) = tokens.x.shape, (n // merge for n in grid)
  x = tokens.x.reshape(k, rows, merge, columns, merge, d)
  x = x.transpose(0, 1, 3, 2, 4, 5).reshape(k, rows * columns, -1)
  first = jnp.arange(grid[0] * grid[1]).reshape(grid)[::merge, ::merge].ravel()
  own = jax.tree.map(lambda a: a[:, first], tokens)
  return own.replace(x=x, position=own.position // merge)


def coordinates(
  start: Int[Array, "b n"],
  kind: Int[Array, "b n"],
  place: Int[Array, "b n"],
  tokens: Tokens,
  time: Int[Array, "b n"] | None = None,
) -> Int[Array, "b n 3"]:
  """Positions in time, row and column; a text advances on all.

  Args:
    start, kind, place: see `tokjax.models.vlm.Prompts`.
    tokens: the visual ones of all images, their positions rows and columns.
    time: of VISUAL ones, see `tokjax.models.vlm.Prompts`; None: all zero.
  """
  inside = tokens.position.reshape(-1, 2).astype(jnp.int32)
  inside = jnp.pad(inside, ((0, 0), (1, 0)))[place]
  if time is not None:
    inside = inside.at[..., 0].add(time)
  visual = (kind == Kind.VISUAL)[..., None]
  return start[..., None] + jnp.where(visual, inside, 0)
