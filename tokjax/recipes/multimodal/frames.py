"""LFTR: what images in a row have in common is one token, the best stay."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from tokjax import scores, selection
from tokjax.binding import bind
from tokjax.budgets import Budget, Once
from tokjax.plan import Assignment
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.signals import Origin, Origins, Received, Seen, asks
from tokjax.slots import Slots


def first_alike(site: Site, *, similarity: float) -> Int[Array, "n"]:
  """The first of the like tokens at one place that end at each token.

  Tokens of images that follow each other are compared.
  """
  n, origin = site.num_free, Origins.of(site[Origin()])
  mask = jnp.ones((n,), bool) if site.mask is None else site.mask
  place = selection.groups(
    origin.crop, origin.row, origin.column, mask=mask
  )
  order = jnp.lexsort((origin.image, place))
  image, place = origin.image[order], place[order]
  unit = scores.normalise(site.x.astype(jnp.float32)[order])
  cosine = (unit[1:] * unit[:-1]).sum(axis=-1)
  follows = (place[1:] == place[:-1]) & (image[1:] == image[:-1] + 1)
  same = jnp.append(False, follows & (cosine >= similarity) & mask[order][1:])
  first = jax.lax.cummax(jnp.where(same, 0, jnp.arange(n)))
  return jnp.zeros((n,), order.dtype).at[order].set(order[first])


@asks(Origin())
def merge_then_prune(
  site: Site, *, significance: Seen, similarity: float
) -> Assignment:
  """Like tokens of images in a row become their mean; the best stay."""
  n = site.num_free
  mask = jnp.ones((n,), bool) if site.mask is None else site.mask
  due = site.keep if site.due is None else site.due
  first = first_alike(site, similarity=similarity)
  leads = mask & (first == jnp.arange(n))
  stays = leads & (selection.places(site[significance], mask=leads) < due)
  plan = Assignment.from_parent(
    jnp.where(stays[first], first, n), site.keep, mask=mask, full=False,
    exact=False,
  )  # fmt: skip
  return plan.weighted(jnp.ones((n,), jnp.float32))


@recipe(
  "lftr",
  family="vlm",
  paper="Learning Free Token Reduction for Multi-Modal LLM",
  arxiv="2501.17391",
  evidence="weak: the abstract and a digest of version 1; no code was found",
  deviations="choices of this project where no source says more: tokens at the"
  " same place of images that follow each other merge where their cosine is"
  " large enough, before others are pruned by the attention that their patches"
  " receive in the last block of the encoder",
)
def lftr(similarity: float = 0.9, budget: Budget = Once(0.25)) -> Slots:
  """Merges what frames have in common, then prunes what is left.

  Args:
    similarity: cosine from which tokens of two images in a row merge.
    budget: how many visual tokens of a prompt remain at most.
  """
  rule = bind(
    merge_then_prune, significance=Seen(question=Received()),
    similarity=similarity,
  )  # fmt: skip
  return Slots(Reduce(rule, budget, free=VISUAL, position="renumber"))
