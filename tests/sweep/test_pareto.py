import numpy as np
import pytest

from tokjax.analysis import pareto, plots


def test_front_keeps_what_nothing_dominates():
  cost, loss = [1.0, 2.0, 3.0, 2.0, 4.0], [5.0, 3.0, 3.0, 2.0, 1.0]
  assert pareto.front(cost, loss) == [0, 3, 4]


def test_front_of_equal_points_is_the_first():
  assert pareto.front([1.0, 1.0], [2.0, 2.0]) == [0]


def test_front_agrees_with_the_definition():
  rng = np.random.default_rng(0)
  cost, loss = rng.integers(0, 12, (2, 60)).astype(float)
  found = pareto.front(cost.tolist(), loss.tolist())

  def dominated(i):
    less = (cost <= cost[i]) & (loss <= loss[i])
    return (less & ((cost < cost[i]) | (loss < loss[i]))).any()

  points = {(cost[i], loss[i]) for i in range(60) if not dominated(i)}
  assert {(cost[i], loss[i]) for i in found} == points


def test_loss_between_points_is_linear_and_never_extrapolated():
  curve = [(0.4, 10.0), (0.8, 2.0), (0.8, 4.0)]
  found = pareto.at_cost(curve, [0.6, 0.8, 0.3, 0.9])
  np.testing.assert_allclose(found, [6.0, 2.0, np.nan, np.nan])


def test_ranking_sorts_by_loss_then_drift_and_puts_the_unreached_last():
  losses = {
    "far": [(0.9, 0.0)],
    "bad": [(0.5, 8.0)],
    "good": [(0.5, 0.0)],
    "better": [(0.5, 0.0)],
  }
  drifts = {
    "far": [(0.9, 0.0)],
    "bad": [(0.5, 0.3)],
    "good": [(0.5, 0.2)],
    "better": [(0.5, 0.1)],
  }
  ranked = pareto.rank(losses, drifts, (0.75, 0.5))
  assert [r.method for r in ranked] == ["better", "good", "bad", "far"]
  np.testing.assert_allclose(ranked[2].loss, [4.0, 8.0])
  assert np.isnan(ranked[3].loss).all()
  assert [r.method for r in ranked if r.on_front] == ["good"]


@pytest.mark.parametrize(
  ("heights", "expected"),
  [
    ([0.1, 0.5], [0.1, 0.5]),
    ([0.5, 0.5], [0.45, 0.55]),
    ([1.0, 1.0, 1.0], [0.8, 0.9, 1.0]),
    ([0.1, 0.48, 0.52, 0.6], [0.1, 0.4333333, 0.5333333, 0.6333333]),
  ],
)
def test_names_are_moved_apart(heights, expected):
  np.testing.assert_allclose(plots.spread(heights, 0.1), expected)


def test_plot_is_written(tmp_path):
  curves = {"random": [(1.5, 3.0)], "a": [(2.0, 1.0)], "b": [(1.2, 2.0)]}
  axis = plots.Axis("lost", 1.0)
  path = tmp_path / "pareto.png"
  panel = plots.Panel(axis, curves)
  plots.draw_pareto([[panel]], ("saved",), path, title="t")
  assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_s_front_ends_where_a_baseline_is_better():
  curves = {
    "good": [(1.5, 1.0)], "chance": [(3.0, 90.0)], "base": [(4.0, 50.0)],
    "far": [(5.0, 80.0)],
  }  # fmt: skip
  on_front = [method for method, *_ in plots._front(curves, {"base"})]
  assert on_front == ["far", "good"]
