"""Vision recipes that drop tokens by importance."""

import dataclasses

import jax.numpy as jnp

from tokjax import budgets, scores, selection
from tokjax.binding import bind
from tokjax.budgets import Budget
from tokjax.plan import Assignment, Plan
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.signals import CLASS, Attention, Keys, Values, asks
from tokjax.slots import Slots
from tokjax.tokens import Kind


@asks(CLASS)
def topk_rule(site: Site) -> Plan:
  """Class attention, mean over heads; the top tokens in descending order."""
  score = scores.mean_over_heads(site.class_attention)
  index, valid = selection.top_k(
    score, site.keep, mask=site.mask, count=site.due
  )
  return Assignment.select(index, site.num_free, valid)


@recipe(
  "topk",
  family="vision",
  paper="EViT's baseline: Not All Patches are What You Need",
  arxiv="2202.07800",
  code="youweiliang/evit",
  training="both",
  evidence="youweiliang/evit:evit.py with fuse_token=False (5ca95a7), its block"
  " run next to this one on the same arrays",
  deviations="a distillation token is protected; the official code ranks it"
  " among the patches",
)
def topk(
  budget: Budget = budgets.Ratio(0.7, None, "current", "ceil"),
) -> Slots:
  """Keeps the patches that the class token attends to most, most first."""
  return Slots(Reduce(topk_rule, budget, at="mlp"))


@asks(CLASS)
def evit_rule(site: Site) -> Plan:
  """The top tokens, then the sum of the others weighted by attention."""
  # In float32, like all weights of plans.
  attention = site.class_attention.astype(jnp.float32)
  score, n = scores.mean_over_heads(attention), site.num_free
  count = site.keep if site.due is None else site.due
  place = selection.places(score, mask=site.mask)
  # The fused token takes the place of the best one that does not stay.
  fused = jnp.argmax(place == count - 1)
  parent = jnp.where(place < count, jnp.arange(n), fused)
  plan = Assignment.from_parent(parent, site.keep, order=place, mask=site.mask)
  weight = jnp.where(place < count - 1, 1.0, score)
  return dataclasses.replace(
    plan, anchor_weight=weight[plan.anchor], rest_weight=weight[plan.rest]
  )


@recipe(
  "evit",
  family="vision",
  paper="Not All Patches are What You Need: Expediting Vision Transformers via"
  " Token Reorganizations",
  arxiv="2202.07800",
  code="youweiliang/evit",
  training="both",
  evidence="youweiliang/evit:evit.py, helpers.py (5ca95a7), three stages of its"
  " blocks run next to these on the same arrays",
  deviations="a distillation token is protected; the official code ranks it"
  " among the patches",
)
def evit(
  budget: Budget = budgets.Ratio(0.7, None, "current", "ceil", extra=1),
) -> Slots:
  """`topk`, with the dropped patches summed into one fused token.

  The sum is weighted by class attention and not normalised. The fused token
  is an ordinary one at the next stage; `budget` counts it.
  """
  return Slots(Reduce(evit_rule, budget, at="mlp"))


@asks(CLASS, Values())
def ats_rule(site: Site, *, sampling: str) -> Plan:
  """Samples the scores; picked tokens are in ascending order of score."""
  score = scores.attention_times_norm(site.class_attention, site.values)
  chosen = selection.inverse_cdf(
    score, site.keep, rule=sampling, mask=site.mask, count=site.due
  )
  index, valid = selection.of_mask(chosen, site.keep, order=score)
  return Assignment.select(index, site.num_free, valid)


@recipe(
  "ats",
  family="vision",
  paper="Adaptive Token Sampling For Efficient Vision Transformers",
  arxiv="2111.15667",
  code="adaptivetokensampling/ATS",
  training="both",
  evidence="adaptivetokensampling/ATS:libs/models/transformers/ats_block.py"
  " (9271257), run next to this on the same arrays",
  deviations="tokens dropped earlier are masked exactly, as official code does"
  " for a single image with DROP_TOKENS (its configuration); without that, or"
  " in a larger batch, its softmax gives them 1e-6 / n and their zeros shift"
  " the minimum that the distribution is normalised with, so that an image's"
  " tokens depend on its neighbours; fewer than 8 sample points are allowed",
)
def ats(
  budget: Budget = budgets.Capped(1.0, 0.25), sampling: str = "code"
) -> Slots:
  """Samples tokens by class attention times value length, inside attention.

  How many differ between examples; unused room is masked.

  Args:
    budget: number of sample points: the room for tokens in each block.
    sampling: "code" or "paper", see `tokjax.selection.inverse_cdf`.
  """
  if sampling not in ("code", "paper"):
    raise ValueError(f"sampling={sampling!r}: must be 'code' or 'paper'")
  reduce = Reduce(
    bind(ats_rule, sampling=sampling),
    budget,
    at="queries",
  )
  return Slots(reduce)


def _importance(site: Site, alive, iterations: int, variance):
  """Page rank of the free tokens on attention among those left, `[f]`."""
  attention = jnp.where(alive[None, None, :], site.attention, 0.0)
  total = attention.sum(axis=-1, keepdims=True)
  attention = attention / jnp.where(total > 0, total, 1.0)
  is_class = site.tokens.kind == Kind.CLASS
  start = jnp.where(is_class, jnp.sqrt(1.0 * alive.sum()), 1.0) * alive
  rank = scores.pagerank(attention, iterations=iterations, start=start)
  return site.free(scores.rms_over_heads(rank, variance=variance, mask=alive))


def _most_similar(site: Site, importance, remove):
  """Of the less important half, those most similar to the other half, `[f]`."""
  n = site.num_free
  real = jnp.ones((n,), bool) if site.mask is None else site.mask
  place = selection.places(importance, mask=real)
  half = (real.sum() + 1) // 2
  source, target = real & (place >= half), real & (place < half)
  keys = site.keys.mean(axis=0)
  similarity = scores.cosine(keys, keys)
  best = jnp.where(target[None, :], similarity, -jnp.inf).max(axis=-1)
  return source & (selection.places(best, mask=source) < remove)


@asks(Attention(-1), Keys(-1))
def zero_tprune_rule(
  site: Site, *, similar: float, variance: tuple[float, float]
) -> Plan:
  """Ranks, drops the similar, ranks the survivors again, keeps the top."""
  alive = site.tokens.mask
  if alive is None:
    alive = jnp.ones((site.tokens.num_tokens,), bool)
  # Protected tokens vote, but cannot be drawn.
  free = jnp.ones((site.num_free,), bool) if site.mask is None else site.mask
  keep = site.keep if site.due is None else site.due
  remove = jnp.floor(similar * (free.sum() - keep))
  # Attention is that of the block before: 30 votes in the first quarter of
  # the blocks, 1 in the last.
  iterations = (30, 5, 5, 1)[4 * (site.layer - 1) // site.depth]

  importance = _importance(site, alive, 1, variance)
  drop = _most_similar(site, importance, remove)
  alive = site.with_free(alive, site.free(alive) & ~drop)
  importance = _importance(site, alive, iterations, variance)
  top = selection.top_k(
    importance, site.keep, mask=free & ~drop, count=site.due
  )
  index, valid = selection.in_order(top)
  valid = None if site.mask is None else valid
  return Assignment.select(index, site.num_free, valid)


@recipe(
  "zero_tprune",
  family="vision",
  paper="Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the"
  " Attention Graph in Pre-Trained Transformers",
  arxiv="2305.17328",
  evidence="weak: the abstract, a detailed public note and partial third-party"
  " code, which agree on the vote, the mean over heads, the order of stages,"
  " the partition and the bounds; the official repository holds a web page",
  deviations="choices of this project where no source says more: acts before"
  " the blocks at a quarter, half and three quarters of the depth; half of the"
  " tokens go by similarity and half by importance; variance is that of scores"
  " of mean one, the only common scale on which both bounds bind; after tokens"
  " went by similarity the same attention, renormalised among the survivors, is"
  " voted on; if no head passes the filter, all vote",
)
def zero_tprune(
  budget: Budget = budgets.Ratio(0.7),
  similar: float = 0.5,
  variance: tuple[float, float] = (0.01, 0.7),
) -> Slots:
  """Importance by page rank on the attention graph, then similarity, then both.

  Args:
    budget: tokens that remain at each pruning layer.
    similar: part of the removed tokens that goes because it is similar to a
      more important one; the rest goes by importance.
    variance: heads whose importance is spread less or more do not vote.
  """
  if not 0 <= similar <= 1:
    raise ValueError(f"similar={similar}: must lie in [0, 1]")
  if not 0 <= variance[0] <= variance[1]:
    raise ValueError(
      f"variance={variance}: must be (low, high), 0 <= low <= high"
    )
  reduce = Reduce(
    bind(zero_tprune_rule, similar=similar, variance=variance),
    budget,
  )
  return Slots(reduce)
