"""TokenCorrCompressor: as many patches stay as are not repeated."""

import dataclasses

import jax.numpy as jnp

from tokjax import scores, selection
from tokjax.binding import bind
from tokjax.budgets import AtEnd, Budget, Share
from tokjax.plan import Assignment
from tokjax.recipes.multimodal import merging
from tokjax.recipes.multimodal.encoder import CLASS_MEAN
from tokjax.recipes.multimodal.parts import floors
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.signals import Block, Keys, Rows
from tokjax.slots import Slots


def dense_and_attended(
  site: Site,
  *,
  metric: Keys,
  late: Rows,
  early: Rows,
  similarity: float,
  others: int,
  share: float,
) -> Assignment:
  """As many of the best as there are distinct tokens, and a mean of the rest.

  A token is repeated that is as similar as `similarity` to so many others. Of
  those that stay a share is chosen by one row of attention, the others by
  another.
  """
  n = site.num_free
  mask = jnp.ones((n,), bool) if site.mask is None else site.mask
  due = site.keep if site.due is None else site.due
  keys = jnp.moveaxis(site[metric].astype(jnp.float32), 0, 1).reshape(n, -1)
  alike = scores.cosine(keys, keys) >= similarity
  alike = alike & mask[None] & ~jnp.eye(n, dtype=bool)
  distinct = mask & (alike.sum(axis=1) < others)
  count = jnp.minimum(distinct.sum(), due - 1)
  first = floors(share, n)[count]
  best = mask & (selection.places(site[late], mask=mask) < first)
  more = selection.places(site[early], mask=mask & ~best) < count - first
  best = best | (mask & ~best & more)
  return merging.with_mean_of_rest(best, mask & ~best, site.keep)


@recipe(
  "token_corr",
  family="vlm",
  paper="Token-level Correlation-guided Compression for Efficient Multimodal"
  " Document Understanding",
  arxiv="2407.14439",
  evidence="weak: the abstract and public reviews; the official repository"
  " holds no code",
  deviations="choices of this project where no source says more: which keys"
  " are compared, how similar and how many others make a token repeated, the"
  " block of local mining, that tokens are chosen by rank, and the share of"
  " each; a budget bounds how many patches of a crop remain; the token of the"
  " rest is their mean",
)
def token_corr(
  similarity: float = 0.7,
  others: int = 3,
  share: float = 0.5,
  local: float = 0.5,
  budget: Budget = Share(0.5),
) -> Slots:
  """Each crop keeps as many patches as it has that are not repeated.

  Which ones the class token says, in the last block and in an earlier one. The
  others become one more token.

  Args:
    similarity: cosine of keys from which two patches are alike.
    others: how many of these make a patch a repeated one.
    share: of the patches that stay, chosen in the last block.
    local: the other block, as a fraction of the depth.
    budget: how many remain at most, the token of the rest included.
  """
  if others < 1 or not 0 <= share <= 1:
    raise ValueError(
      f"others={others}, share={share}: must be 1 or more, and lie in [0, 1]"
    )
  rule = bind(
    dense_and_attended, metric=Keys(), late=CLASS_MEAN,
    early=dataclasses.replace(CLASS_MEAN, layer=Block(local)),
    similarity=similarity, others=others, share=share,
  )  # fmt: skip
  return Slots(Reduce(rule, AtEnd(budget), at="output")).within("vision")
