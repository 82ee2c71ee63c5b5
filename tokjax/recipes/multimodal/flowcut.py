"""FlowCut: tokens leave an encoder as information has flowed to the class."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax import selection
from tokjax.binding import bind
from tokjax.budgets import Count, EveryOther
from tokjax.recipes.multimodal.encoder import CLASS_MEAN
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Carried, Reduce
from tokjax.reduce.rules import keep_selected
from tokjax.reduce.site import Site
from tokjax.signals import Rows, Values
from tokjax.slots import Slots

ROOM = EveryOther(Count(64))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flow:
  """What goes on to the next block that removes tokens.

  Attributes:
    score: of the tokens that remain, over the blocks so far, `[m]`.
    initial: how many tokens there were at first.
  """

  score: Float[Array, "*b m"]
  initial: int = dataclasses.field(metadata={"static": True})


def _shares(
  x: Float[Array, "f"], mask: Bool[Array, "f"] | None
) -> Float[Array, "f"]:
  x = x.astype(jnp.float32)
  x = x if mask is None else jnp.where(mask, x, 0.0)
  return x / x.sum()


def inflow(site: Site, row: Rows, values: Values) -> Float[Array, "f"]:
  """How much of each patch has flowed to the class token in one block.

  The share of the class token's attention and the share of its similarity in
  values, times the length of the value.
  """
  v = site.whole(values).astype(jnp.float32)
  logits = jnp.einsum("hk,hnk->hn", v[:, 0], v)
  if site.tokens.mask is not None:
    logits = jnp.where(site.tokens.mask[None], logits, -jnp.inf)
  alike = site.free(jax.nn.softmax(logits, axis=-1).mean(axis=0))
  length = jnp.abs(site.free(v.mean(axis=0))).sum(axis=-1)
  shares = _shares(site[row], site.mask) + _shares(alike, site.mask)
  return shares * length


def evenness(
  row: Float[Array, "f"], mask: Bool[Array, "f"] | None
) -> Float[Array, ""]:
  """Entropy of attention as a fraction of the largest there can be."""
  share = _shares(row, mask)
  entropy = jax.scipy.special.entr(share).sum()
  many = row.shape[0] if mask is None else mask.sum()
  return entropy / jnp.log(jnp.maximum(many, 2))


def cut(
  site: Site,
  *,
  row: Rows,
  values: Values,
  row_before: Rows,
  values_before: Values,
) -> Carried:
  """Keeps the best by the running mean; how many, attention says."""
  budget: Any = site.budget
  if not isinstance(budget, EveryOther):
    raise ValueError(
      f"budget={budget!r}: must be a tokjax.budgets.EveryOther, which says how"
      " many tokens remain in the end"
    )
  carry = site.carry
  score = inflow(site, row_before, values_before)
  score = score if carry is None else (carry.score + score) / 2
  score = (score + inflow(site, row, values)) / 2
  initial = site.num_free if carry is None else carry.initial
  left, count = budget.left(site.layer, site.depth), site.due
  if left:
    final = budget.final(initial, site.depth)
    real = site.num_free if site.mask is None else site.mask.sum()
    even = evenness(site[row], site.mask)
    gone = jnp.round((real - final) / math.sqrt(left) * (1 - even**2))
    some = jnp.maximum(real - gone.astype(jnp.int32), min(final, site.keep))
    count = some if count is None else jnp.minimum(some, count)
  top = selection.top_k(score, site.keep, mask=site.mask, count=count)
  plan = keep_selected(site, top)
  return Carried(plan, Flow(plan.take(score), initial))


@recipe(
  "flowcut",
  family="vlm",
  paper="FlowCut: Rethinking Redundancy via Information Flow for Efficient"
  " Vision-Language Models",
  arxiv="2505.19536",
  code="TungChintao/FlowCut",
  evidence="TungChintao/FlowCut:flowcut/modeling_clip_flowcut.py,"
  " utils_flowcut.py (a2ecd24), run next to this on the same weights",
  deviations="room is that of `evenness`: where attention is more even, tokens"
  " beyond it go earlier (evenness=1.0 is the official rule, which saves"
  " nothing before the last block that cuts, as shapes are static); each image"
  " has its own count (there the largest cut of the batch); in an encoder of an"
  " even number of blocks the first one neither cuts nor counts; the encoder's"
  " part only (for any-resolution images the official code also prunes in the"
  " first block of the language model)",
)
def flowcut(budget: EveryOther = ROOM) -> Slots:
  """In every second block patches go that gave least to the class token.

  How many is decided by how evenly the class token attends: the more even,
  the fewer. Scores are running means over blocks.

  Args:
    budget: how many patches remain in the end, and the room on the way.
  """
  rule = bind(
    cut, row=CLASS_MEAN, values=Values(),
    row_before=dataclasses.replace(CLASS_MEAN, layer=-1),
    values_before=Values(layer=-1),
  )  # fmt: skip
  return Slots(Reduce(rule, budget, at="output")).within("vision")
