"""CATP: tokens of images that show examples, and of the image of the question.

A prompt is a row of samples, each an image and the text behind it: examples
first (the context), the question last (the query).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import diversity, scores, selection
from tokjax.binding import bind
from tokjax.budgets import Budget, BudgetError, check_keep
from tokjax.budgets.base import block
from tokjax.plan import Plan
from tokjax.recipes.multimodal.parts import quotas
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_best, keep_selected
from tokjax.reduce.site import Site
from tokjax.signals import Last, Rows
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens

# The fraction that remains, by default.
KEEP = 0.222
# Above every cosine: tokens that stay in any case.
STAYS = 2.0


@dataclasses.dataclass(frozen=True)
class Toward(Budget):
  """A part of the way to a fraction, one of several reductions on that way.

  Attributes:
    keep: fraction of the tokens that is shared out to this reduction, the
      `number`-th of `all`: that of the last one to the power number / all.
    part: how much of what goes in all is gone behind it.
    layer: the block, or a fraction of the depth.
    after: so many blocks behind that.
    number, all: see `keep`.
  """

  keep: float
  part: float
  layer: int | float
  after: int = 0
  number: int = 1
  all: int = 1

  def __post_init__(self):
    check_keep(self.keep)

  @property
  def last(self) -> float:
    """The fraction at the end of the way."""
    return round(self.keep ** (self.all / self.number), 6)

  def count(self, tokens: int, layer: int, depth: int) -> int | None:
    at = block(self.layer, depth) + self.after
    if at >= depth:
      raise BudgetError(
        f"from_layer={self.layer}: leaves no block behind it for the query, of"
        f" {depth}; take an earlier one"
      )
    if layer != at:
      return None
    kept = max(1, int(tokens * (1 - self.part * (1 - self.last)) + 1e-6))
    return None if kept == tokens else kept

  def with_keep(self, keep: float) -> "Toward":
    return dataclasses.replace(self, keep=keep)


class Samples(NamedTuple):
  """The samples of a prompt, as seen from each of its tokens.

  Attributes:
    number: of the sample, from 1; 0: in front of the first image.
    query: whether it is the last one.
    real: False for padding.
    text: whether it is text.
  """

  number: Int[Array, "n"]
  query: Bool[Array, "n"]
  real: Bool[Array, "n"]
  text: Bool[Array, "n"]

  @classmethod
  def of(cls, tokens: Tokens) -> "Samples":
    n = tokens.num_tokens
    real = jnp.ones((n,), bool) if tokens.mask is None else tokens.mask
    text = tokens.kind == Kind.TEXT
    image = real & ~text
    begins = image & ~jnp.concatenate([jnp.zeros((1,), bool), image[:-1]])
    number = jnp.cumsum(begins)
    query = real & (number == jnp.where(image, number, 0).max())
    return cls(number, query, real, real & text)

  @property
  def context(self) -> Bool[Array, "n"]:
    return self.real & ~self.query & (self.number > 0)


def mean_of(
  x: Float[Array, "n d"], which: Bool[Array, "n"]
) -> Float[Array, "1 d"]:
  """The mean of some tokens, zeros if there are none."""
  total = jnp.where(which[:, None], x, 0.0).sum(axis=0, keepdims=True)
  return total / jnp.maximum(which.sum(), 1)


def aligned_cover(site: Site, *, aligned: float) -> Plan:
  """Covers the tokens of each image by some that are like its text.

  Similarities are cosines brought to 0..1. Every image has its share of what
  remains.
  """
  x, free = site.x.astype(jnp.float32), site.mask
  n = x.shape[0]
  free = jnp.ones((n,), bool) if free is None else free
  samples = Samples.of(site.tokens)
  half = lambda a, b: (1 + scores.cosine(a, b)) / 2
  group = jnp.where(free, samples.number, n)
  same = (group[:, None] == group[None]) & free[:, None] & free[None]
  text = jnp.where(samples.text, samples.number, n)
  words = jax.ops.segment_sum(x, text, num_segments=n)
  # The mean has the direction of the sum.
  alike = jnp.diagonal(half(x, words[jnp.minimum(group, n - 1)]))
  most, _ = quotas(group, site.keep if site.due is None else site.due)
  picked = diversity.coverage(
    jnp.where(same, half(x, x), 0.0), site.keep, bonus=aligned * alike,
    group=group, most=most, mask=free, count=site.due,
  )  # fmt: skip
  return keep_selected(site, picked)


def context_of_query(
  site: Site, *, now: Rows, before: Rows, aligned: float
) -> Plan:
  """Tokens of the context that the last token turns to, and like the query.

  What remains of the context is by its own size. Tokens of the query stay as
  far as there is room, which is everywhere but in prompts with little context.
  """
  budget, x = site.budget, site.tokens.x.astype(jnp.float32)
  assert isinstance(budget, Toward)
  samples, free = Samples.of(site.tokens), site.mask
  free = jnp.ones(samples.real.shape, bool) if free is None else free
  cosine = scores.cosine(x, mean_of(x, samples.query))[:, 0]
  rise = jnp.maximum(site[now] - site[before], 0.0)
  query, context = free & samples.query, free & samples.context
  score = rise.astype(jnp.float32) + aligned * cosine
  # Of what the first stage left of it.
  share = 2 * budget.last / (1 + budget.last)
  many = jnp.floor(context.sum() * share + 1e-4).astype(jnp.int32)
  best = context & (selection.places(score, mask=context) < many)
  return keep_best(site, jnp.where(best, STAYS, cosine), query | best)


def query_of_context(site: Site) -> Plan:
  """Tokens of the query that are like the context, or like its own text."""
  samples, x = Samples.of(site.tokens), site.tokens.x.astype(jnp.float32)
  context = samples.context
  told = jnp.where(context.any(), context, samples.query & samples.text)
  cosine = scores.cosine(x, mean_of(x, told))[:, 0]
  return keep_best(site, jnp.where(samples.query, cosine, STAYS))


@recipe(
  "catp",
  family="vlm",
  paper="CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced"
  " Multimodal In-Context Learning",
  arxiv="2508.07871",
  evidence="weak: the text of the paper; no code was found",
  deviations="the first stage leaves a share of all visual tokens, divided"
  " among images by size (there so many of each image); how many go from the"
  " context depends on the prompt, so that its block has room for what a prompt"
  " with one example needs, and the rest is masked for one block; images that"
  " stand next to each other without text are one; of a prompt with a single"
  " image, which has no context, tokens like its text remain",
)
def catp(
  from_layer: int | float = 0.25, words: float = 0.7, query: float = 0.6
) -> Slots:
  """For prompts of examples: each stage prunes one side with the other.

  Before the language model half of what goes does, of every image: tokens that
  cover it and are like its text stay. Behind a block the images of the context
  lose the rest, behind the next block that of the query. 22.2 % remain.

  Args:
    from_layer: block behind which the context is pruned, as a number or a
      fraction of the depth; the query behind the next. The paper takes 10 of 40
      blocks, and 6 of 32.
    words: weight of the similarity with the text of a token's own sample.
    query: weight of the similarity with the mean of the query sample.
  """
  if words < 0 or query < 0:
    raise ValueError(f"words={words}, query={query}: must be 0 or more")
  shared = lambda number: KEEP ** (number / 3)
  last = lambda layer: Rows(of=Last(), over="mean", layer=layer)
  rules = (
    bind(aligned_cover, aligned=words),
    bind(context_of_query, now=last(0), before=last(-1), aligned=query),
    query_of_context,
  )
  budgets = (
    Toward(shared(1), 0.5, 0, number=1, all=3),
    Toward(shared(2), 0.75, from_layer, number=2, all=3),
    Toward(shared(3), 1.0, from_layer, 1, number=3, all=3),
  )
  places = ("input", "output", "output")
  return Slots(
    tuple(
      Reduce(rule, budget, at=at, free=VISUAL)
      for rule, budget, at in zip(rules, budgets, places, strict=True)
    )
  )
