"""Methods compared at equal cost: fronts, curves, ranks."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

# Points (cost, loss) of every method; of both, less is better.
Curves = Mapping[str, Sequence[tuple[float, float]]]


def front(cost: Sequence[float], loss: Sequence[float]) -> list[int]:
  """Indices of the points that no other one dominates, by ascending cost.

  A point is dominated if another costs no more and loses less, or loses as
  much and costs less. Of equal points the first stays.
  """
  order = sorted(range(len(cost)), key=lambda i: (cost[i], loss[i], i))
  least, out = np.inf, []
  for i in order:
    if loss[i] < least:
      least = loss[i]
      out.append(i)
  return out


def leaders(curves: Curves) -> list[str]:
  """Methods with a point on the front of all, the cheapest first."""
  points = [(m, *p) for m, curve in curves.items() for p in curve]
  found = front([p[1] for p in points], [p[2] for p in points])
  return list(dict.fromkeys(points[i][0] for i in found))


def at_cost(
  curve: Sequence[tuple[float, float]], where: Sequence[float]
) -> np.ndarray:
  """Loss of one method at given costs, linear between its points.

  Args:
    curve: the method's points, in any order; of points of the same cost the
      best counts.
    where: costs asked for, `[c]`.

  Returns:
    `[c]`; NaN where the method has no point on one of the sides: nothing is
    extrapolated.
  """
  best: dict[float, float] = {}
  for cost, loss in curve:
    best[cost] = min(loss, best.get(cost, np.inf))
  if not best:
    return np.full(len(where), np.nan)
  known = sorted(best)
  return np.interp(
    where, known, [best[c] for c in known], left=np.nan, right=np.nan
  )


@dataclasses.dataclass(frozen=True)
class Ranked:
  """A method among others at equal cost.

  Attributes:
    method: its name.
    loss: at each of the costs asked for, `[c]`, NaN where it has no points
      around that cost.
    drift: at the first of them.
    on_front: whether one of its points is on the front of all methods.
  """

  method: str
  loss: np.ndarray
  drift: float
  on_front: bool


def rank(
  losses: Curves, drifts: Curves, shares: Sequence[float]
) -> list[Ranked]:
  """Methods by what they lose at equal cost, the best first.

  Args:
    losses: cost as a share of the unreduced model's, and loss against it, of
      each method. The unreduced model, (1, 0), is a point of every curve.
    drifts: the same with a second loss, that decides where the first is equal.
    shares: costs to compare at; methods are sorted by the loss at the first,
      those that do not reach it come last.
  """
  first = leaders(losses)
  out = []
  for method, curve in losses.items():
    loss = at_cost([*curve, (1.0, 0.0)], shares)
    (drift,) = at_cost([*drifts[method], (1.0, 0.0)], shares[:1])
    out.append(Ranked(method, loss, float(drift), method in first))

  def key(ranked: Ranked):
    values = (ranked.loss[0], ranked.drift, *ranked.loss[1:])
    # Rounded: a difference below a thousandth of a point is none.
    return [(np.isnan(v), round(float(np.nan_to_num(v)), 5)) for v in values]

  return sorted(out, key=key)
