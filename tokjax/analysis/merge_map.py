"""Which patches became one token: from a model's plans to pictures.

`ViT.apply` returns the plans of every block in `out["plans"]`. `provenance`
composes them, `groups` says for every patch of the image which token it ended
in, and `paint` shows it: patches that share a token share its mean colour and
an outline, dropped ones are dark.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from tokjax.analysis import quick
from tokjax.models import ViT
from tokjax.plan import Mixture, Plan

# Added to what is left of a dropped patch: a dark blue that no black is.
DROPPED = np.array([16.0, 20.0, 44.0])


@dataclasses.dataclass(frozen=True)
class Groups:
  """Where the patches of a batch of images went.

  Attributes:
    index: token that each patch belongs to most, -1 where it was dropped,
      `[b, rows, columns]`.
    share: how much of a patch each token takes over, `[b, m, patches]`; zeros
      and ones unless a plan is a mixture.
    num_tokens: real tokens that stand for patches, `[b]`.
  """

  index: Int[np.ndarray, "b rows columns"]
  share: Float[np.ndarray, "b m n"]
  num_tokens: Int[np.ndarray, "b"]


def compose(first: Plan, second: Plan) -> Plan:
  """`first.then(second)` for batches of plans."""
  return jax.vmap(lambda a, b: a.then(b))(first, second)


def provenance(plans: Sequence[Sequence[Plan]]) -> list[Plan | None]:
  """The plan from the model's input to the tokens of each block.

  Args:
    plans: `out["plans"]`: a list of batched plans for every block.

  Returns:
    One plan for each block; None as long as nothing has been reduced. A plan
    that is undone after its sub-layer shows in its own block only: the next
    plan starts from all tokens again.
  """
  out: list[Plan | None] = []
  whole: Plan | None = None
  before: Plan | None = None
  for made in plans:
    for plan in made:
      undone = whole is not None and plan.num_sources != whole.num_outputs
      start = before if undone else whole
      before, whole = start, plan if start is None else compose(start, plan)
    out.append(whole)
  return out


def shares(plan: Plan) -> Float[Array, "b m n"]:
  """How much of each source a batch of plans puts into each output."""

  def one(plan):
    if isinstance(plan, Mixture):
      return plan.share
    return (jnp.arange(plan.num_outputs)[:, None] == plan.index[None, :]) * 1.0

  return jax.vmap(one)(plan)


def groups(plan: Plan | None, grid: tuple[int, int], batch: int = 1) -> Groups:
  """Groups of the patches, which are the last rows * columns sources.

  Args:
    plan: from the model's input, of a batch; None: every patch by itself.
    grid: rows and columns of patches.
    batch: number of images where there is no plan.
  """
  if plan is None:
    return _of_shares(None, grid, batch)
  return _of_shares(shares(plan), grid, batch)


def _of_shares(share, grid: tuple[int, int], batch: int) -> Groups:
  count = grid[0] * grid[1]
  if share is None:
    share = np.broadcast_to(
      np.eye(count, dtype=np.float32), (batch, count, count)
    )
  share = np.asarray(share)[:, :, -count:]
  index = np.where(share.sum(axis=1) > 0, share.argmax(axis=1), -1)
  used = (share > 0).any(axis=2).sum(axis=1)
  return Groups(index.reshape(-1, *grid), share, used)


def look(
  model: ViT,
  params: Any,
  images: Float[Array, "b y x c"],
  key: PRNGKeyArray,
  *,
  every: bool = True,
) -> list[Groups]:
  """Runs a model and says where the patches are after each block.

  Args:
    model: built with the slots of a recipe.
    params: its parameters.
    images: prepared.
    key: for random recipes.
    every: False: after the last block only; compiles faster.
  """

  @quick.jit
  def run(params, images, key):
    out: Any = model.apply({"params": params}, images, key=key)[1]
    found = provenance(out["plans"])[0 if every else -1 :]
    share = [None if plan is None else shares(plan) for plan in found]
    return out["tokens"].position, share

  position, found = run(params, images, key)
  # Of these images, which may have another size than the configured one.
  patch, front = model.config.patch_size, len(model.config.kinds)
  grid = images.shape[1] // patch, images.shape[2] // patch
  smaller = position.shape[1] - front != grid[0] * grid[1]
  if smaller and all(share is None for share in found):
    return [cells(position, grid)] * len(found)
  return [_of_shares(share, grid, len(images)) for share in found]


def cells(position: Float[Array, "b n 2"], grid: tuple[int, int]) -> Groups:
  """Groups of a model that read a smaller image: cells of its coarser grid.

  Args:
    position: rows and columns of the model's tokens, a batch.
    grid: rows and columns of patches of the image that was given.
  """
  position = np.asarray(position)
  side = position[0].max(axis=0).astype(int) + 1
  row, column = (
    np.minimum((np.arange(n) + 0.5) * m / n, m - 1).astype(int)
    for n, m in zip(grid, side, strict=True)
  )
  index = row[:, None] * side[1] + column[None, :]
  index = np.broadcast_to(index, (len(position), *grid))
  every = np.arange(side[0] * side[1])
  share = index.reshape(len(position), 1, -1) == every[None, :, None]
  return Groups(index, share * 1.0, np.full(len(position), every.size))


def paint(
  image: UInt8[np.ndarray, "height width c"],
  index: Int[np.ndarray, "rows columns"],
  share: Float[np.ndarray, "m n"],
  *,
  line: int = 1,
) -> UInt8[np.ndarray, "height width 3"]:
  """One image with its merge map.

  Patches that are a token of their own show the image; those that share one
  show the mean colour of all that went into it, with an outline around them.

  Args:
    image: grey or colour; its sides are multiples of the grid's.
    index, share: one image's part of `Groups`.
    line: width of the outline in pixels; 0: none.

  Raises:
    ValueError: the sides of the image are not multiples of the grid's.
  """
  rows, columns = index.shape
  height, width, channels = image.shape
  if height % rows or width % columns:
    raise ValueError(
      f"image of {height}x{width} pixels: sides must be multiples of the"
      f" {rows}x{columns} patches"
    )
  tall, wide = height // rows, width // columns
  colour = image.astype(np.float32)
  patch = colour.reshape(rows, tall, columns, wide, channels).mean((1, 3))
  mass = np.maximum(share.sum(axis=1, keepdims=True), 1e-9)
  mean = share @ patch.reshape(rows * columns, channels) / mass
  # Every patch shows the tokens it went to: one of them unless mixed.
  total = share.sum(axis=0)
  shown = (share.T @ mean) / np.maximum(total, 1e-9)[:, None]
  shared = (share @ (total > 0) > 1 + 1e-6)[np.maximum(index, 0)] & (index >= 0)
  shown = shown.reshape(rows, columns, channels)
  big = lambda x: x.repeat(tall, axis=0).repeat(wide, axis=1)
  out = np.where(big(shared)[:, :, None], big(shown), colour)
  out = np.broadcast_to(out, (height, width, 3))
  out = np.where(big(index < 0)[:, :, None], DROPPED + 0.12 * out, out)
  edge = outline(big(index), line) & big(shared)
  # Dark on bright and bright on dark, so that it shows on every colour.
  bright = out.mean(axis=-1, keepdims=True) > 110
  ink = np.where(bright, 0.55 * out, 0.6 * out + 75.0)
  out = np.where(edge[:, :, None], ink, out)
  return out.round().clip(0, 255).astype(np.uint8)


def outline(index: Int[np.ndarray, "y x"], line: int) -> np.ndarray:
  """True within `line` pixels of another group, on both sides, `[y, x]`."""
  edge = np.zeros(index.shape, bool)
  for step in range(1, line + 1):
    for axis in (0, 1):
      size = index.shape[axis]
      one = np.take(index, range(step, size), axis)
      two = np.take(index, range(size - step), axis)
      cut = one != two
      pad = [(0, 0), (0, 0)]
      pad[axis] = (step, 0)
      edge |= np.pad(cut, pad)
      pad[axis] = (0, step)
      edge |= np.pad(cut, pad)
  return edge


def displayable(
  images: Float[np.ndarray, "b y x c"],
) -> UInt8[np.ndarray, "b y x c"]:
  """Prepared images, each stretched to 0..255."""
  low = images.min(axis=(1, 2, 3), keepdims=True)
  high = images.max(axis=(1, 2, 3), keepdims=True)
  scaled = (images - low) / np.maximum(high - low, 1e-9)
  return (255 * scaled).round().astype(np.uint8)
