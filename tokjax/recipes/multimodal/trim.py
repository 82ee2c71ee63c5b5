"""TRIM: visual tokens that the question is about, and a mean of the rest."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import scores, selection
from tokjax.binding import bind
from tokjax.budgets import Budget, Once
from tokjax.plan import Assignment
from tokjax.recipes.multimodal import merging
from tokjax.recipes.multimodal.diverse import WORDS, words
from tokjax.recipes.multimodal.prumerge import outliers
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.slots import Slots


def about_words(
  site: Site, *, similarity: Literal["product", "cosine"], sign: int
) -> Float[Array, "n"]:
  """Softmax over the visual tokens of their similarity with the mean word."""
  x = site.tokens.x.astype(jnp.float32)
  text = words(site)
  mean = jnp.where(text[:, None], x, 0.0).sum(axis=0)
  mean = mean / jnp.maximum(text.sum(), 1)
  if similarity == "cosine":
    x, mean = scores.normalise(x), scores.normalise(mean[None])[0]
  return jax.nn.softmax(sign * (x @ mean), where=site.mask)


def best_and_mean(
  site: Site, *, similarity: Literal["product", "cosine"], sign: int,
  adaptive: bool,
) -> Assignment:  # fmt: skip
  """The best stay in order; behind them stands the mean of all others."""
  n, mask = site.num_free, site.mask
  mask = jnp.ones((n,), bool) if mask is None else mask
  due = site.keep if site.due is None else site.due
  score = about_words(site, similarity=similarity, sign=sign)
  many = due - 1
  if adaptive:
    many = jnp.minimum(many, outliers(score, mask))
  best = mask & (selection.places(score, mask=mask) < many)
  return merging.with_mean_of_rest(best, mask & ~best, site.keep)


@recipe(
  "trim",
  family="vlm",
  paper="Less is More: A Simple yet Effective Token Reduction Method for"
  " Efficient Multi-modal LLMs",
  arxiv="2409.10994",
  code="FreedomIntelligence/TRIM",
  evidence="FreedomIntelligence/TRIM:llava/model/multimodal_encoder/"
  "clip_encoder.py (f5a232d), its reduction run next to this on the same"
  " arrays",
  deviations=f"{WORDS}, their mean (the official code compares patches with the"
  " question in CLIP, whose text encoder a VisionLanguage does not hold); a"
  " budget bounds how many tokens remain; each prompt has its own count, of all"
  " of its images (there the batch has one, int(n * (count / n)), which may be"
  " one less than the count); where no token is an outlier the mean alone"
  " remains (there an error)",
)
def trim(
  budget: Budget = Once(0.25),
  adaptive: bool = True,
  similarity: str = "product",
  negated: bool = True,
) -> Slots:
  """Visual tokens that are similar to the words, and one mean of the others.

  Args:
    budget: how many tokens remain, the mean included.
    adaptive: only those stay whose share of the softmax is an outlier; False:
      as many as the budget says.
    similarity: "product", as in the official code, or "cosine", as in the
      paper.
    negated: the least similar stay, as in the official code; the formula of
      the paper has no sign.
  """
  if similarity not in ("product", "cosine"):
    raise ValueError(
      f"similarity={similarity!r}: must be 'product' or 'cosine'"
    )
  rule = bind(
    best_and_mean, similarity=similarity, sign=-1 if negated else 1,
    adaptive=adaptive,
  )  # fmt: skip
  return Slots(Reduce(rule, budget, free=VISUAL, position="renumber"))
