"""LVLM_CSP: few visual tokens, all of them, then those that matter."""

import jax.numpy as jnp

from tokjax.binding import bind
from tokjax.budgets import Budget, Count, Once
from tokjax.plan import Assignment
from tokjax.recipes.multimodal import merging
from tokjax.recipes.multimodal.encoder import CLASS_MEAN
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.recipes.registry import recipe
from tokjax.reduce.back import Back
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_selected, keep_top
from tokjax.reduce.site import Site
from tokjax.signals import Last, Rows, Seen
from tokjax.slots import Slots


def keep_strided(site: Site) -> Assignment:
  """Keeps every floor(n / m)th token, m of them, from the first on."""
  mask = jnp.ones((site.num_free,), bool) if site.mask is None else site.mask
  due = site.keep if site.due is None else site.due
  return keep_selected(site, merging.strided(mask, site.keep, due))


@recipe(
  "lvlm_csp",
  family="vlm",
  paper="LVLM_CSP: Accelerating Large Vision Language Models via Clustering,"
  " Scattering, and Pruning for Reasoning Segmentation",
  arxiv="2504.10854",
  evidence="weak: the abstract and a public summary; no code was found",
  deviations="choices of this project where no source says more: the blocks at"
  " which tokens return and are pruned, the latter by attention of that block,"
  " and how many remain; tokens return with the embeddings that they had; the"
  " last token of the prompt takes the part of the [SEG] token; centres by"
  " instance masks are left out",
)
def lvlm_csp(
  centres: str = "uniform",
  until: int = 2,
  clusters: Budget = Once(Count(64)),
  budget: Budget = Once(0.125, 0.5),
) -> Slots:
  """The first blocks see a few visual tokens, the next ones all, then the best.

  Args:
    centres: "uniform" or "class": the tokens of the first blocks stand evenly
      spaced, or are those that the encoder's class token attends to most.
    until: how many blocks that is.
    clusters: how many tokens these see.
    budget: how many tokens remain in the end, and from where on.
  """
  if centres not in ("uniform", "class"):
    raise ValueError(f"centres={centres!r}: must be 'uniform' or 'class'")
  rule = bind(keep_strided)
  if centres == "class":
    rule = keep_top(Seen(question=CLASS_MEAN))
  prune = keep_top(Rows(of=Last(), over="mean"))
  return Slots((
    Reduce(rule, clusters, free=VISUAL, back=Back(until, fill="input")),
    Reduce(prune, budget, free=VISUAL),
  ))
