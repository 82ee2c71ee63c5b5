"""Vision recipes that merge tokens into similar ones."""

import jax
import jax.numpy as jnp

from tokjax import budgets, matching, scores, selection
from tokjax.binding import bind
from tokjax.budgets import Budget
from tokjax.plan import Assignment, Plan
from tokjax.recipes.registry import recipe
from tokjax.reduce.back import Back
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.signals import Attention, Grid, Keys, Random, Received, asks
from tokjax.slots import Slots


def cosines(features, sides: matching.Sides):
  """Similarity of sources and targets, `[a, b]`."""
  unit = scores.normalise(features)
  return unit[sides.source] @ unit[sides.target].T


def alternating(site: Site) -> matching.Sides:
  """Every other token of the whole sequence, as the official code splits.

  The class token is the first source although it never merges, so the first
  free token is a target when an odd number of protected tokens precedes it.
  """
  first = "target" if site.protected % 2 else "source"
  return matching.parity(site.num_free, first=first, mask=site.mask)


def by_index_after_class(site: Site) -> str:
  """Official code sorts the unmerged only when there is a class token."""
  return "index" if site.protected else "similarity"


def merge(site: Site, features, sides: matching.Sides, **options) -> Assignment:
  """Merges the most similar sources into their targets; sums so far."""
  return matching.bipartite(
    cosines(features, sides),
    sides,
    site.num_free,
    site.remove,
    mask=site.mask,
    count=site.due,
    **options,
  )


@asks(Keys())
def tome_rule(site: Site, *, sides: str) -> Plan:
  """Sources join the targets with the most similar keys."""
  n, keep = site.num_free, site.keep
  if sides == "alternating":
    pair = alternating(site)
  elif sides == "kth":
    pair = matching.every_kth(n, keep, mask=site.mask, count=site.due)
  else:
    pair = matching.at_random(
      site.key, n, keep, mask=site.mask, count=site.due
    )
  unmerged = by_index_after_class(site)
  plan = merge(site, site.keys.mean(axis=0), pair, unmerged=unmerged)
  return plan.weighted(site.size)


@asks(Keys(), Random())
def tome_random_rule(site: Site, *, sides: str) -> Plan:
  """`tome_rule` with random targets."""
  return tome_rule(site, sides=sides)


@recipe(
  "tome",
  family="vision",
  paper="Token Merging: Your ViT But Faster",
  arxiv="2210.09461",
  code="facebookresearch/ToMe",
  training="both",
  evidence="facebookresearch/ToMe:tome/{merge,utils}.py, patch/{timm,mae}.py",
  deviations="an r that cannot be carried out is an error, not capped silently;"
  " the kth variant loses no tail",
)
def tome(
  budget: Budget = budgets.Constant(13),
  sides: str = "alternating",
  proportional: bool = True,
  pool_by_size: bool = False,
) -> Slots:
  """Merges the r most similar pairs of two alternating sets in every block.

  Args:
    budget: see `tokjax.budgets`.
    sides: "alternating", "kth" (evenly spaced targets, all others merge) or
      "random" (random targets).
    proportional: attention counts merged tokens by size (off for MAE).
    pool_by_size: mean pooling counts them by size (on for MAE).
  """
  if sides not in ("alternating", "kth", "random"):
    raise ValueError(
      f"sides={sides!r}: must be 'alternating', 'kth' or 'random'"
    )
  at_most = 0.5 if sides == "alternating" else 1.0
  rule = bind(tome_random_rule if sides == "random" else tome_rule, sides=sides)
  reduce = Reduce(rule, budget, at="mlp", at_most=at_most)
  return Slots(reduce, proportional=proportional, pool_by_size=pool_by_size)


@recipe(
  "tome_kth",
  family="vision",
  paper="Token Merging: Your ViT But Faster",
  arxiv="2210.09461",
  code="facebookresearch/ToMe",
  evidence="facebookresearch/ToMe:tome/merge.py (kth_bipartite_soft_matching)",
  deviations="the tail of n mod k tokens merges instead of being dropped; the"
  " class token takes no part",
)
def tome_kth(budget: Budget = budgets.Ratio(0.7)) -> Slots:
  """ToMe with evenly spaced targets that all other tokens join."""
  return tome(budget, sides="kth")


@recipe(
  "tome_random",
  family="vision",
  paper="Token Merging: Your ViT But Faster",
  arxiv="2210.09461",
  code="facebookresearch/ToMe",
  evidence="facebookresearch/ToMe:tome/merge.py"
  " (random_bipartite_soft_matching)",
  deviations="targets are in the order of the sequence; the class token takes"
  " no part",
)
def tome_random(budget: Budget = budgets.Constant(13)) -> Slots:
  """ToMe with random targets that all other tokens join."""
  return tome(budget, sides="random")


@asks(Grid())
def tomesd_rule(site: Site, *, cell: tuple[int, int], random: bool) -> Plan:
  """Tokens join the most similar of one target in each cell."""
  key = site.key if random else None
  sides = matching.grid_cells(site.grid, cell, key=key)
  plan = merge(site, site.x, sides, unmerged="similarity")
  return plan.weighted(jnp.ones((site.num_free,), jnp.float32))


@asks(Grid(), Random())
def tomesd_random_rule(site: Site, *, cell: tuple[int, int]) -> Plan:
  """`tomesd_rule` with targets that are drawn."""
  return tomesd_rule(site, cell=cell, random=True)


@recipe(
  "tomesd",
  family="vision",
  paper="Token Merging for Fast Stable Diffusion",
  arxiv="2303.17604",
  code="dbolya/tomesd",
  evidence="dbolya/tomesd:tomesd/{merge,patch}.py",
  deviations="each example draws its own targets (the official code shares them"
  " within a batch); the class token takes part in attention unmerged",
)
def tomesd(
  budget: Budget = budgets.Capped(0.5),
  cell: tuple[int, int] = (2, 2),
  random: bool = True,
) -> Slots:
  """Merges around attention: one target in each cell of the grid, given back.

  Args:
    budget: tokens that attend in each block; at least one a cell.
    cell: rows and columns of a cell.
    random: draw the target of a cell; False: its top left token.
  """
  rule = bind(tomesd_rule, cell=cell, random=False)
  if random:
    rule = bind(tomesd_random_rule, cell=cell)
  reduce = Reduce(
    rule,
    budget,
    at="attention",
    back=Back("sublayer"),
    at_most=1 - 1 / (cell[0] * cell[1]),
  )
  return Slots(reduce)


def pitome_rule(
  site: Site, *, margin: float, alpha: float, bsm_blocks: str, features: str
) -> Plan:
  """Tokens of high energy join similar ones of adjacent rank."""
  n = site.num_free
  features = site.keys.mean(axis=0) if features == "keys" else site.x
  margin = margin * (1 - site.layer / site.depth)
  energy = scores.energy(features, margin, alpha=alpha, mask=site.mask)
  if site.mask is not None:
    energy = jnp.where(site.mask, energy, -jnp.inf)
  rank = jnp.argsort(-energy, stable=True)
  half = (site.depth + 1) // 2
  all_ranked = {
    "none": False,
    "all": True,
    "first": site.layer < half,
    "last": site.layer >= half,
  }[bsm_blocks]
  if all_ranked:
    sides = matching.parity(n, order=rank)
    plan = merge(site, features, sides, unmerged="similarity")
  else:
    plan = _merge_redundant(site, features, rank)
  return plan.weighted(site.size)


@asks(Keys())
def pitome_keys_rule(site: Site, **options) -> Plan:
  """`pitome_rule` on keys."""
  return pitome_rule(site, **options)


def _merge_redundant(site: Site, features, rank) -> Assignment:
  """The 2k tokens of highest energy: odd ranks absorb even ranks, all merge."""
  n, k = site.num_free, site.remove
  sides = matching.parity(2 * k, order=rank[: 2 * k])
  similarity = cosines(features, sides)
  if site.due is None or site.mask is None:
    return matching.bipartite(similarity, sides, n, k, kept=rank[2 * k :])
  # A padded example merges fewer: only its own 2k' highest are eligible.
  due = jnp.clip(site.mask.sum() - site.due, 0, k)
  eligible = jnp.arange(k) < due
  similarity = jnp.where(eligible[None, :], similarity, -jnp.inf)
  to = sides.target[selection.first_max(similarity, axis=-1)[1]]
  to = jnp.where(eligible, to, sides.source)
  parent = jnp.arange(n).at[sides.source].set(to)
  place = jnp.argsort(rank)
  order = jnp.where(place < 2 * due, n + place, place)
  return Assignment.from_parent(parent, n - k, order=order, mask=site.mask)


@recipe(
  "pitome",
  family="vision",
  paper="Accelerating Transformers with Spectrum-Preserving Token Merging",
  arxiv="2405.16148",
  code="hchautran/PiToMe",
  evidence="hchautran/PiToMe:algo/pitome/merge.py, patch/{deit,mae,clip}.py",
  deviations="follows the code where the paper differs: the margin is"
  " subtracted inside the ELU and attention is not proportional; pooling by"
  " size divides by the number of patches (the code by that of image channels,"
  " which the norm behind it cancels)",
)
def pitome(
  budget: Budget = budgets.Ratio(0.925, "all", "current", "ceil"),
  margin: float = 0.75,
  alpha: float = 1.0,
  bsm_blocks: str = "first",
  features: str = "keys",
  pool_by_size: bool = False,
) -> Slots:
  """Merges tokens with many similar ones (high energy), protects others.

  Args:
    budget: tokens that remain after each block; at least half of them.
    margin: similarity above which tokens count as similar in block 0; falls
      linearly with depth.
    alpha: weight of what lies below the margin.
    bsm_blocks: where all tokens are ranked and the best edges merge, instead
      of merging the most redundant ones: "first" or "last" half of the
      blocks (DeiT, MAE), "all" or "none" (AugReg, CLIP).
    features: what is compared: "keys" or "hidden" states (CLIP, BLIP).
    pool_by_size: mean pooling counts merged tokens by size (on for MAE).
  """
  if bsm_blocks not in ("first", "last", "all", "none"):
    raise ValueError(
      f"bsm_blocks={bsm_blocks!r}: must be 'first', 'last', 'all' or 'none'"
    )
  if features not in ("keys", "hidden"):
    raise ValueError(f"features={features!r}: must be 'keys' or 'hidden'")
  rule = bind(
    pitome_keys_rule if features == "keys" else pitome_rule,
    margin=margin,
    alpha=alpha,
    bsm_blocks=bsm_blocks,
    features=features,
  )
  reduce = Reduce(rule, budget, at="mlp", at_most=0.5)
  return Slots(reduce, pool_by_size=pool_by_size)


def rarity(mass, mask, temperature: float):
  """(1 / mass) scaled to a maximum of one, to the power 1 / temperature."""
  if not temperature:
    return jnp.ones_like(mass)
  inverse = 1 / jnp.maximum(mass, 1e-12)
  if mask is not None:
    inverse = jnp.where(mask, inverse, 0.0)
  return (inverse / jnp.maximum(inverse.max(), 1e-12)) ** (1 / temperature)


@asks(Attention(), Received())
def mctf_rule(
  site: Site, *, similarity: float, information: float, size: float
) -> Plan:
  """Similar, uninformative and small tokens fuse; arguments: temperatures."""
  mask, n = site.tokens.mask, site.num_free
  received = scores.mean_over_heads(site.whole(Received()))
  received = jax.lax.stop_gradient(received)
  weight = site.free(
    rarity(received, mask, information) * rarity(site.tokens.size, mask, size)
  )
  sides = alternating(site)
  edge = (cosines(site.x, sides) + 1) / 2
  power = 1 / similarity if similarity else 0
  edge = jnp.maximum(edge, 0.0) ** power
  edge = edge * weight[sides.source][:, None] * weight[sides.target][None, :]
  plan = matching.bidirectional(
    edge,
    sides,
    n,
    site.remove,
    mask=site.mask,
    count=site.due,
    unmerged=by_index_after_class(site),
  )
  return plan.weighted(site.free(received) * site.size)


@recipe(
  "mctf",
  family="vision",
  paper="Multi-criteria Token Fusion with One-step-ahead Attention",
  arxiv="2403.10030",
  code="mlvlab/MCTF",
  training="both",
  evidence="mlvlab/MCTF:utils/mctf.py, models/SA/MHSA.py, modules/blocks.py",
  deviations="the official floor of ten remaining tokens is not applied; a"
  " schedule that asks for too much is an error",
)
def mctf(
  budget: Budget = budgets.Constant(16, first=1),
  temperatures: tuple[float, float, float] = (1.0, 20.0, 40.0),
) -> Slots:
  """Fuses by similarity, information and size, from both sides.

  Acts on a block's input with the attention computed one step ahead: its map
  is merged along and not computed again.

  Args:
    budget: r = 16 in blocks 1 to 11 for DeiT-S.
    temperatures: of similarity, information (attention received) and size;
      0 switches one off.
  """
  similarity, information, size = temperatures
  rule = bind(
    mctf_rule, similarity=similarity, information=information, size=size
  )
  reduce = Reduce(
    rule,
    budget,
    at="attention",
    at_most=0.5,
  )
  return Slots(reduce, proportional=True)
