"""Vision recipes that cluster tokens."""

import jax.numpy as jnp

from tokjax import budgets, matching, scores, selection
from tokjax.binding import bind
from tokjax.budgets import Budget
from tokjax.plan import Plan
from tokjax.recipes.registry import recipe
from tokjax.reduce.back import Back
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.signals import CLASS, Grid, Keys, Question, Received, asks
from tokjax.slots import Slots

COUNTS = (
  "counts are exact, 49 of 100 tokens after two stages of 0.7, where"
  " int(n * r ** t) of the code gives 48"
)


@asks(Keys())
def atc_rule(site: Site, *, linkage: str) -> Plan:
  """Clusters of similar keys become their mean."""
  plan = matching.agglomerative(
    site.keys.mean(axis=0),
    site.keep,
    linkage=linkage,
    mask=site.mask,
    count=site.due,
  )
  return plan.weighted(site.size)


@recipe(
  "atc",
  family="vision",
  paper="Agglomerative Token Clustering",
  arxiv="2409.11923",
  code="JoakimHaurum/ATC",
  training="both",
  evidence="JoakimHaurum/ATC:ATC_setup/models/atc.py, SSLBackbone_setup/"
  "token_reduc/merge.py",
  deviations="ties are broken by index (unspecified in scikit-learn); as many"
  " tokens remain as asked for (the off-the-shelf code keeps one more); sizes"
  " weight means whether or not attention is proportional; " + COUNTS,
)
def atc(
  budget: Budget = budgets.Ratio(0.7),
  linkage: str = "average",
  proportional: bool = True,
) -> Slots:
  """Joins the two closest clusters of keys until enough are left.

  Args:
    budget: clusters that remain.
    linkage: "single", "complete" or "average".
    proportional: attention counts merged tokens by size.
  """
  if linkage not in ("single", "complete", "average"):
    raise ValueError(
      f"linkage={linkage!r}: must be 'single', 'complete' or 'average'"
    )
  reduce = Reduce(bind(atc_rule, linkage=linkage), budget, at="mlp")
  return Slots(reduce, proportional=proportional)


def dpc_knn_rule(site: Site, *, neighbours: int) -> Plan:
  """Tokens around one density peak become their mean."""
  plan = matching.dpc_knn(
    site.x, site.keep, neighbours=neighbours, mask=site.mask, count=site.due
  )
  return plan.weighted(jnp.ones((site.num_free,), jnp.float32))


@recipe(
  "dpc_knn",
  family="vision",
  paper="Not All Tokens Are Equal: Human-centric Visual Analysis via Token"
  " Clustering Transformer (TCFormer)",
  arxiv="2204.08680",
  code="zengwang430521/TCFormer",
  training="both",
  evidence="JoakimHaurum/TokenReduction:models/dpcknn.py",
  deviations="equal weights (the learned token score is a trained part); ties"
  " go to the lower index instead of to noise; no 1e-6 in the mean; " + COUNTS,
)
def dpc_knn(
  budget: Budget = budgets.Ratio(0.7), neighbours: int = 5
) -> Slots:
  """Averages the members of density-peak clusters of the hidden states.

  Args:
    budget: clusters that remain.
    neighbours: nearest tokens, itself included, that make a token's density.
  """
  rule = bind(dpc_knn_rule, neighbours=neighbours)
  return Slots(Reduce(rule, budget))


@asks(Received(-1))
def kmedoids_rule(site: Site, *, iterations: int, cost: str) -> Plan:
  """Medoids stay, the other tokens of their clusters go."""
  plan = matching.kmedoids(
    site.x,
    site.keep,
    weight=scores.mean_over_heads(site.received_attention),
    iterations=iterations,
    cost=cost,
    mask=site.mask,
    count=site.due,
  )
  return plan.pruned()


@recipe(
  "kmedoids",
  family="vision",
  paper="Token Pooling in Vision Transformers; Which Tokens to Use?",
  arxiv="2110.03860",
  code="JoakimHaurum/TokenReduction",
  training="both",
  evidence="JoakimHaurum/TokenReduction:models/kmedoids.py",
  deviations="cost='members' gives the standard algorithm; the default is the"
  " repository's, which sums over all tokens; an empty cluster keeps its medoid"
  " instead of taking token 0; " + COUNTS,
)
def kmedoids(
  budget: Budget = budgets.Ratio(0.7),
  iterations: int = 3,
  cost: str = "all",
) -> Slots:
  """Keeps the medoids of clusters seeded by attention received.

  Args:
    budget: medoids that remain.
    iterations: how often medoids move.
    cost: "all" or "members", see `tokjax.matching.kmedoids`.
  """
  if cost not in ("all", "members"):
    raise ValueError(f"cost={cost!r}: must be 'all' or 'members'")
  rule = bind(kmedoids_rule, iterations=iterations, cost=cost)
  return Slots(Reduce(rule, budget))


@asks(Keys())
def token_transforming_rule(
  site: Site, *, temperature: float, relative: bool, importance: Question
) -> Plan:
  """All tokens spread over the most important ones."""
  score = scores.mean_over_heads(site[importance])
  anchor, valid = selection.top_k(
    score, site.keep, mask=site.mask, count=site.due
  )
  return matching.soft_assignment(
    site.keys.mean(axis=0),
    anchor,
    temperature=temperature,
    relative=relative,
    mask=site.mask,
    valid=valid,
  )


@recipe(
  "token_transforming",
  family="vision",
  paper="Token Transforming: A Unified and Training-Free Token Compression"
  " Framework for Vision Transformer Acceleration",
  arxiv="2506.05709",
  evidence="weak: abstract and a figure caption; no code is public. A"
  " reconstruction, no fidelity is claimed",
  deviations="anchors, temperature and restoration are this project's choice;"
  " the temperature is relative to the distances that a block has, which differ"
  " by a factor of 20 between the blocks of one model, unless one is given",
)
def token_transforming(
  budget: Budget = budgets.Ratio(0.7),
  temperature: float | None = None,
  softness: float = 0.1,
  importance: str = "class_attention",
) -> Slots:
  """Many-to-many: every token spreads over the most important ones.

  Args:
    budget: anchors that remain.
    temperature: of the softmax over cosines to the anchors; towards 0 each
      token goes to its nearest anchor. None: `softness` of the mean of
      1 - cosine between tokens and anchors, in every example and block.
    softness: see `temperature`.
    importance: "class_attention" or "received_attention".
  """
  if importance not in ("class_attention", "received_attention"):
    raise ValueError(
      f"importance={importance!r}: must be 'class_attention' or"
      " 'received_attention'"
    )
  relative = temperature is None
  value = softness if temperature is None else temperature
  if not value > 0:
    name = "softness" if relative else "temperature"
    raise ValueError(f"{name}={value}: must be positive")
  question = CLASS if importance == "class_attention" else Received()
  rule = bind(
    token_transforming_rule,
    temperature=value,
    relative=relative,
    importance=question,
  )
  reduce = Reduce(rule, budget, at="mlp")
  return Slots(reduce, proportional=True)


@asks(Grid())
def expedit_rule(site: Site, **options) -> Plan:
  """The grid becomes a smaller grid of soft clusters."""
  cells = matching.cells_of(site.grid, site.keep)
  return matching.local_soft_kmeans(site.x, site.grid, cells, **options)


@recipe(
  "expedit",
  family="vision",
  paper="Expediting Large-Scale Vision Transformer for Dense Prediction without"
  " Fine-tuning",
  arxiv="2210.01035",
  code="Expedit-LargeScale-Vision-Transformer/Expedit-SAM",
  evidence="Expedit-SAM:segment_anything/modeling/hourglass_image_encoder.py,"
  " Expedit-Segmenter:mmseg/ops/{cluster,reconstruction}.py",
  deviations="the class token is set aside and keeps attending; tau is relative"
  " to the distances that a model has, because the published 0.02 (Segmenter-L)"
  " and 0.01 (SAM-H) are absolute and average everything in a model of smaller"
  " features: temperature=0.02 is as published",
)
def expedit(
  budget: Budget = budgets.Square(0.5, 0.25),
  iterations: int = 5,
  temperature: float | None = None,
  sharpness: float = 10.0,
  window: int = 5,
  neighbours: int = 20,
  normalise: bool = False,
) -> Slots:
  """Runs the deeper blocks on a smaller grid of soft clusters, then restores.

  Args:
    budget: cells of the smaller grid, and the block from which on it is used.
    iterations: steps of soft k-means.
    temperature: factor on the squared distance (tau in the paper, which takes
      0.02 and 0.01). None: `sharpness` over the mean squared distance between
      tokens and the first centres that they see, in every example.
    sharpness: see `temperature`.
    window: side of the neighbourhood of a token, in cells.
    neighbours: centres that a token is restored from.
    normalise: weights of restoration sum to one; the official code divides
      by the L2 norm.
  """
  relative = temperature is None
  value = sharpness if temperature is None else temperature
  if not value > 0:
    name = "sharpness" if relative else "temperature"
    raise ValueError(f"{name}={value}: must be positive")
  rule = bind(
    expedit_rule,
    iterations=iterations,
    temperature=value,
    relative=relative,
    window=window,
    neighbours=neighbours,
    normalise=normalise,
  )
  return Slots(Reduce(rule, budget, back=Back("end")))
