"""Images and crops of a prompt, seen from each of its tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tokjax import selection
from tokjax.reduce.site import Site
from tokjax.signals import Origin, Origins


class Parts(NamedTuple):
  """The images of a prompt and their crops, as seen from each token.

  Attributes:
    origin: where tokens come from.
    image: number of the image among those with tokens; n: no free token.
    crop: number of the crop among those of all images; n: no free token.
    whole: True for tokens of the view of the whole image.
    block: the crop that a token of the whole image lies in.
  """

  origin: Origins
  image: Int[Array, "n"]
  crop: Int[Array, "n"]
  whole: Bool[Array, "n"]
  block: Int[Array, "n"]

  @classmethod
  def of(cls, site: Site) -> "Parts":
    origin, mask = Origins.of(site[Origin()]), site.mask
    mask = jnp.ones(origin.image.shape, bool) if mask is None else mask
    image = selection.groups(origin.image, mask=mask)
    crop = selection.groups(origin.image, origin.crop, mask=mask)
    whole = mask & (origin.crop == 0)

    def part(at, length, parts):
      side = jnp.maximum(length // jnp.maximum(parts, 1), 1)
      return jnp.minimum(at // side, parts - 1)

    down = part(origin.row, origin.rows, origin.high)
    right = part(origin.column, origin.columns, origin.wide)
    block = 1 + down * origin.wide + right
    return cls(origin, image, crop, whole, block)

  def of_image(self, values: Array, over: Any = jax.ops.segment_sum) -> Array:
    """The sum over the tokens of each image, seen from its tokens.

    Args:
      values: `[n]`.
      over: another reduction, such as `jax.ops.segment_max`.
    """
    n = self.image.shape[0]
    found = over(values, self.image, num_segments=n)
    return found[jnp.minimum(self.image, n - 1)]

  def in_crops(self) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """Row and column of tokens of crops in the grid of all crops."""
    o, wide = self.origin, jnp.maximum(self.origin.wide, 1)
    row = (o.crop - 1) // wide * o.rows + o.row
    return row, (o.crop - 1) % wide * o.columns + o.column

  def least(self, values: Int[Array, "n *f"]) -> Int[Array, "n *f"]:
    """The least among the tokens of the crops of each image."""
    inside = (self.image < self.image.shape[0]) & ~self.whole
    inside = inside.reshape(-1, *(1,) * (values.ndim - 1))
    most = jnp.iinfo(jnp.int32).max
    return self.of_image(
      jnp.where(inside, values, most), over=jax.ops.segment_min
    )

  def of_crop(self, values: Array) -> Array:
    """The sum over the tokens of each crop, seen from its tokens."""
    n = self.crop.shape[0]
    found = jax.ops.segment_sum(values, self.crop, num_segments=n)
    return found[jnp.minimum(self.crop, n - 1)]

  def of_block(self, values: Array, at: Int[Array, "n"]) -> Array:
    """The sum over what the whole image shows of a crop, `[n]`.

    Args:
      values: of tokens; those of the whole images count.
      at: of which crop each token asks, of its image.
    """
    n = self.image.shape[0]
    twice = lambda a, b: jnp.concatenate([a, b])
    group = selection.groups(
      twice(self.image, self.image), twice(self.block, at),
      mask=twice(self.whole, self.image < n),
    )  # fmt: skip
    values = jnp.where(self.whole, values, 0)
    found = jax.ops.segment_sum(values, group[:n], num_segments=2 * n)
    return found[jnp.minimum(group[n:], 2 * n - 1)]


def part_of(
  parts: Parts, due: Int[Array, ""] | int
) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
  """What each image may keep, and how many tokens it has, seen from tokens.

  The parts of all images are `due` together.
  """
  return quotas(parts.image, due)


def quotas(
  group: Int[Array, "n"], due: Int[Array, ""] | int
) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
  """`due` shared out by size, and the sizes, seen from each token.

  Args:
    group: numbers of groups, whose tokens stand together; n: in none.
    due: for all groups together.
  """
  n = group.shape[0]
  real = (group < n).astype(jnp.int32)

  def over(reduce, values):
    return reduce(values, group, num_segments=n)[jnp.minimum(group, n - 1)]

  many = over(jax.ops.segment_sum, real)
  upto = over(jax.ops.segment_max, jnp.cumsum(real))
  every = jnp.maximum(real.sum(), 1)
  return due * upto // every - due * (upto - many) // every, many


def fraction_of(budget: Any) -> float | None:
  """The fraction of the tokens that a budget keeps, None if it says none."""
  keep = getattr(budget, "keep", None)
  return keep if keep is None or isinstance(keep, float) else fraction_of(keep)


def floors(share: float, most: int) -> Int[Array, "m"]:
  """int(share * i) for every i up to `most`, as Python says."""
  return jnp.asarray([int(i * share) for i in range(most + 1)], jnp.int32)
