"""How sure a measured loss of accuracy is."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Of a normal distribution: 95 % lie within so many standard deviations.
WIDE = 1.96


def of_seeds(values: np.ndarray) -> tuple[Any, Any]:
  """Means over seeds, and half of their 95 % intervals; 0 with one seed.

  Args:
    values: `[seeds, ...]`.
  """
  spread = values.std(axis=0, ddof=min(1, len(values) - 1))
  return values.mean(axis=0), WIDE * spread / len(values) ** 0.5


class Difference(NamedTuple):
  """A mean difference between two models.

  Attributes:
    mean: over seeds and examples.
    half: of the 95 % interval: `1.96 sqrt(var_examples / n + var_seeds / s)`,
      normal approximation. It covers the choice of examples, of which groups
      count as independent, and with several seeds that of the seed.
    half_examples: what the choice of examples has in that.
    by_seed: means of each seed.
  """

  mean: float
  half: float
  half_examples: float
  by_seed: list[float]


def difference(
  values: np.ndarray, group: Sequence[int] | None = None
) -> Difference:
  """Of two models that are compared example by example.

  So examples that are hard for both do not widen the interval.

  Args:
    values: differences, `[seeds, n]`.
    group: number of each example's group, `[n]`: those of one (questions about
      one text) are not independent. None: each is its own.
  """
  seeds, n = values.shape
  mean = values.mean(axis=0)
  number = np.arange(n) if group is None else np.asarray(group)
  _, number = np.unique(number, return_inverse=True)
  sums = np.bincount(number, mean - mean.mean())
  few = len(sums) < 2
  examples = np.inf if few else sums.var(ddof=1) * len(sums) / n**2
  by_seed = values.mean(axis=1)
  both = examples
  if seeds > 1:
    both += by_seed.var(ddof=1) / seeds
  return Difference(
    float(values.mean()),
    float(WIDE * np.sqrt(both)),
    float(WIDE * np.sqrt(examples)),
    [float(x) for x in by_seed],
  )


def lost(whole: np.ndarray, own: np.ndarray) -> dict[str, Any]:
  """Points of accuracy below the unreduced model, with a 95 % interval.

  Args:
    whole, own: whether the unreduced and the reduced model are right,
      `[seeds, n]`.

  Returns:
    "lost", "lost_interval" (half of it), "lost_interval_images" (what the
    choice of images has in that) and "lost_by_seed", in points; see
    `difference`.
  """
  found = difference(100.0 * (whole.astype(float) - own))
  return {
    "lost": found.mean,
    "lost_interval": found.half,
    "lost_interval_images": found.half_examples,
    "lost_by_seed": found.by_seed,
  }


def unclear(
  by_seed: Mapping[str, np.ndarray],
  halves: Mapping[str, np.ndarray],
  reference: str,
) -> list[str]:
  """Methods that are not clearly better than the reference.

  Compared seed by seed, as a seed that is hard for one is hard for others:
  those that lose as much for any seed, or whose mean difference is within the
  root of the sum of both intervals squared.

  Args:
    by_seed: losses of each method, `[seeds]`.
    halves: half of the interval over images of each, `[1]`.
    reference: one of the methods, not among the result.
  """
  found = []
  for method, losses in by_seed.items():
    gained = by_seed[reference] - losses
    unsure = np.hypot(halves[method][0], halves[reference][0])
    if method != reference and (gained.min() <= 0 or gained.mean() <= unsure):
      found.append(method)
  return found


def agreement(by_seed: Mapping[str, np.ndarray]) -> float:
  """How far seeds agree about the order of methods: mean Kendall's tau.

  Args:
    by_seed: losses of each method, `[seeds]`.

  Returns:
    From -1 (reversed) to 1 (the same); NaN with one seed or one method.
  """
  from scipy import stats  # type: ignore[import-untyped]

  if not by_seed:
    return float("nan")
  losses = np.stack(list(by_seed.values()), axis=1)
  seeds, methods = losses.shape
  if seeds < 2 or methods < 2:
    return float("nan")
  found = [
    stats.kendalltau(losses[i], losses[j]).statistic
    for i in range(seeds)
    for j in range(i)
  ]
  return float(np.mean(found))
