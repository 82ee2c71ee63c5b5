"""MustDrop: windows merge, and tokens go that no word attends to."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import scores, selection
from tokjax.binding import bind
from tokjax.budgets import Budget, Once, Stages
from tokjax.plan import Assignment
from tokjax.recipes.multimodal.encoder import CLASS_MEAN
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.recipes.multimodal.transition import BEHIND
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Carried, Reduce
from tokjax.reduce.rules import keep_best
from tokjax.reduce.site import Site
from tokjax.signals import Grid, Peaks, Rows, Seen, asks
from tokjax.slots import Slots


def likeness(
  x: Float[Array, "f d"], grid: tuple[int, ...], side: int
) -> tuple[Float[Array, "w"], Int[Array, "w m"]]:
  """The mean cosine of two tokens of each window, and which tokens it has.

  Raises:
    ValueError: the windows do not cover the grid.
  """
  if any(n % side for n in grid):
    raise ValueError(
      f"side={side}: windows of this side do not cover a grid of {grid} patches"
    )
  rows, columns = grid
  place = jnp.arange(rows * columns)
  place = place.reshape(rows // side, side, columns // side, side)
  member = place.transpose(0, 2, 1, 3).reshape(-1, side * side)
  own = x.astype(jnp.float32)[member]
  cosine = jax.vmap(lambda own: scores.cosine(own, own))(own)
  apart = jnp.where(jnp.eye(side * side, dtype=bool), 0.0, cosine)
  pairs = side * side * (side * side - 1)
  return apart.sum(axis=(1, 2)) / pairs, member


@asks(Grid())
def merge_windows(site: Site, *, side: int, threshold: float) -> Assignment:
  """Windows of similar tokens become their means, in front of the others.

  Those with the most similar tokens come first.
  """
  n, many = site.num_free, side * side
  alike, member = likeness(site.x, site.grid, side)
  needed = math.ceil(site.remove / (many - 1))
  count = jnp.maximum((alike >= threshold).sum(), needed)
  rank = selection.places(alike)
  place = jnp.arange(n)
  merged = jnp.zeros((n,), bool).at[member].set((rank < count)[:, None])
  first = jnp.zeros((n,), jnp.int32).at[member].set(member[:, :1])
  order = jnp.zeros((n,), jnp.int32).at[member].set(rank[:, None])
  plan = Assignment.from_parent(
    jnp.where(merged, first, place), site.keep,
    order=jnp.where(merged, order, n + place), full=False, exact=False,
  )  # fmt: skip
  return plan.weighted(jnp.ones((n,), jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Start:
  """What goes on to the next block that drops tokens.

  Attributes:
    tokens: how many visual tokens there were at first.
  """

  tokens: Int[Array, "*b"]


def drop_unattended(
  site: Site,
  *,
  key: Seen,
  attended: Rows,
  peak: Peaks,
  share: float,
  together: float,
  alone: float,
) -> Carried:
  """Drops what the text hardly attends to, together and by each word.

  The tokens that the class token attends to most never go.
  """
  n = site.num_free
  mask = jnp.ones((n,), bool) if site.mask is None else site.mask
  start = mask.sum(dtype=jnp.int32) if site.carry is None else site.carry.tokens
  spared = [math.ceil(i * share) for i in range(n + 1)]
  # What is spared is still there, so that it is the best of what is left.
  spared = jnp.asarray(spared)[jnp.minimum(start, n)]
  spared = mask & (selection.places(site[key], mask=mask) < spared)
  total = jnp.where(mask, site[attended], 0.0)
  drop = (total < together * total.sum()) & (site[peak] < alone)
  plan = keep_best(
    site, jnp.where(spared, jnp.inf, total), eligible=spared | ~drop
  )
  return Carried(plan, Start(start))


@recipe(
  "mustdrop",
  family="vlm",
  paper="Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large"
  " Language Model",
  arxiv="2411.10803",
  code="liuting20/MustDrop",
  evidence="liuting20/MustDrop:llava/model/multimodal_encoder/local_merge.py,"
  " language_model/modelling_sparse_llama.py (909afa5), merging and filter run"
  " next to these on the same arrays",
  deviations="budgets are room, as shapes are static: more windows merge, and"
  " more tokens go, than the thresholds say where there is no room for them,"
  " the least similar windows and the most attended tokens last; each image"
  " merges its own number of windows (there the least of the batch); of several"
  " images in a prompt all tokens compete; caches of the blocks that drop"
  " tokens keep these (there they are dropped from it, too, behind the prompt)",
)
def mustdrop(
  merge: Budget = Once(0.8),
  room: Budget = Stages(
    ((0.0625, 0.5), (0.1875, 0.35), (0.3125, 0.25), (0.4375, 0.15))
  ),
  side: int = 3,
  threshold: float = 0.8,
  share: float = 0.08,
  together: float = 0.001,
  alone: float = 0.001,
) -> Slots:
  """Drops visual tokens in the encoder and at some blocks behind it.

  Behind the first block of the encoder windows of similar patches merge. In the
  language model tokens go that the text behind the image hardly attends to, but
  for those that the class token attends to most.

  Args:
    merge: room behind the first block of the encoder.
    room: blocks of the language model that drop tokens, and the room there.
    side: of a window, in patches.
    threshold: mean cosine of the patches of a window from which it merges.
    share: of the visual tokens that never go.
    together: a token may go with less than this share of all attention of the
      text to visual tokens,
    alone: and where no word attends to it by as much as this.
  """
  if side < 2 or not 0 <= share <= 1:
    raise ValueError(
      f"side={side}, share={share}: must be 2 or more, and lie in [0, 1]"
    )
  windows = bind(merge_windows, side=side, threshold=threshold)
  rule = bind(
    drop_unattended, key=Seen(question=CLASS_MEAN, ahead=True),
    attended=Rows(of=BEHIND, over="mean"), peak=Peaks(of=BEHIND), share=share,
    together=together, alone=alone,
  )  # fmt: skip
  return Slots(
    Reduce(rule, room, at="output", free=VISUAL, position="renumber"),
    towers={"vision": Slots(Reduce(windows, merge, at="output"))},
  )
