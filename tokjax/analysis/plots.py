"""The plot of what is lost against what is saved, readable without a legend."""

import dataclasses
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from tokjax.analysis import drawing, pareto

# Okabe and Ito's colours, told apart by colour-blind readers; yellow left out.
COLOURS = (
  "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
)  # fmt: skip
GREY, QUIET, INK, BAND = "#CACACA", "#858585", "#262626", "#FFEDB3"
KEY = (
  "coloured: on the front (the band) of a panel, where no baseline is better;"
  " dashed: {}; grey: all others; shaded: 95 % interval, where known"
)
# Factors that an axis may name.
FACTORS = (
  0.1, 0.2, 0.5, 0.7, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0,
  32.0, 64.0, 128.0,
)  # fmt: skip
# x, y, name, colour of the name, whether that is bold.
End = tuple[float | int, float | int, str, str, bool]
# Pixels between a title and the note behind it.
SPACE = 12
# Names stand this far apart, and at most so far from the end of their line,
# as parts of a panel's height.
GAP, FAR = 0.046, 0.1


@dataclasses.dataclass(frozen=True)
class Axis:
  """A loss on the y axis, downwards.

  Attributes:
    label: what it is.
    linear: loss up to which the scale is about linear, and logarithmic from
      there on; negative losses (gains) are shown likewise.
  """

  label: str
  linear: float

  def squash(self, y):
    return np.arcsinh(np.asarray(y) / self.linear)

  def expand(self, z):
    return self.linear * np.sinh(np.asarray(z))


@dataclasses.dataclass(frozen=True)
class Panel:
  """One loss against one saving.

  Attributes:
    axis: of the loss.
    curves: (factor saved, loss) points of each method.
    intervals: (factor saved, half of the loss's interval) of the same points;
      None: not known.
  """

  axis: Axis
  curves: pareto.Curves
  intervals: pareto.Curves | None = None


def draw_pareto(
  panels: Sequence[Sequence[Panel]],
  labels: Sequence[str],
  path: pathlib.Path,
  *,
  title: str,
  note: str = "",
  reference: str = "random",
  baselines: Collection[str] = (),
) -> None:
  """Losses against savings: a row for each loss, a column for each saving.

  Methods on the front of a panel have a colour and a thick line, the others
  are grey. A colour means one method everywhere. Names stand at the ends of
  the lines; where many lines end in one place, only those on the front have
  one.

  Args:
    panels: a row for each loss. The unreduced model is at (1, 0).
    labels: of the x axis of each column.
    path: the PNG written.
    title, note: in the line above.
    reference: a method drawn dashed wherever it lies.
    baselines: methods that are grey: a front ends where one is better.
  """
  rows, columns = len(panels), len(panels[0])
  every = [panel.curves for row in panels for panel in row]
  grey = {reference, *baselines}
  colours = _colours(every, grey)
  fig = drawing.figure(figsize=(6.0 * columns, 3.9 * rows + 0.5), dpi=110)
  # Names are placed by where lines end on the page, so the page comes first.
  # They stand between the columns; a letter is 0.082 inches wide.
  longest = max(len(name) for curves in every for name in curves)
  right = 1 - (0.15 + 0.082 * longest) / (6.0 * columns)
  fig.subplots_adjust(
    left=0.065, right=right, top=1 - 0.55 / (3.9 * rows),
    bottom=0.065 + 0.1 / (3.9 * rows),
    wspace=max(0.33, 0.026 * longest), hspace=0.2,
  )  # fmt: skip
  places = fig.subplots(rows, columns, squeeze=False)
  for row, line in zip(places, panels, strict=True):
    for place, label, panel in zip(row, labels, line, strict=True):
      _panel(place, panel, colours, reference, grey)
      place.set_xlabel(label if line is panels[-1] else "", color=INK)
    row[0].set_ylabel(line[0].axis.label, color=INK)
  top = 1 - 0.26 / (3.9 * rows + 0.5)
  heading(fig, 0.012, top, title, note)
  fig.text(0.012, 0.012, KEY.format(reference), size=9, color=QUIET)
  fig.savefig(path)


def _front(
  curves: pareto.Curves, grey: Collection[str]
) -> list[tuple[str, float, float]]:
  """Points on the front that are not grey: method, factor, loss."""
  points = [(m, *p) for m, curve in curves.items() for p in curve]
  found = pareto.front([-p[1] for p in points], [p[2] for p in points])
  return [points[i] for i in found if points[i][0] not in grey]


def _colours(
  panels: Sequence[pareto.Curves], grey: Collection[str]
) -> dict[str, str]:
  """Colours of the methods on fronts, the most frequent ones first."""
  times: dict[str, int] = {}
  for curves in panels:
    for method in dict.fromkeys(p[0] for p in _front(curves, grey)):
      times[method] = times.get(method, 0) + 1
  first = sorted(times, key=lambda method: -times[method])
  return dict(zip(first, COLOURS, strict=False))


def _panel(place, panel: Panel, colours, reference, grey) -> None:
  curves = panel.curves
  _style(place, panel.axis, curves)
  if front := _front(curves, grey):
    _, x, y = zip(*front, strict=True)
    place.plot(
      x, y, color=BAND, linewidth=10, zorder=0.5, solid_capstyle="round",
      solid_joinstyle="round",
    )  # fmt: skip
  ends = []
  for method, curve in curves.items():
    x, y = np.array(sorted([(1.0, 0.0), *curve])).T
    colour, text, kind = colours.get(method, GREY), QUIET, "-"
    width, above, bold = 0.9, 1, method in colours
    if bold:
      width, above, text = 2.0, 3, colour
    if method == reference:
      colour, text, kind, width, above = INK, INK, (0, (4, 2)), 1.3, 2
    place.plot(
      x, y, linestyle=kind, color=colour, linewidth=width, zorder=above,
      marker="o", markersize=1.5 + 1.4 * width,
    )  # fmt: skip
    if panel.intervals and (bold or method == reference):
      half = dict([(1.0, 0.0), *panel.intervals[method]])
      half = np.array([half[factor] for factor in x])
      place.fill_between(
        x, y - half, y + half, color=colour, alpha=0.13, linewidth=0, zorder=0.6
      )
    ends.append((x[-1], y[-1], method, text, bold))
  # Limits follow the lines only when asked for.
  place.set_xlim(place.get_xlim())
  names_at_ends(place, ends)


def _style(place: Any, axis: Axis, curves: pareto.Curves) -> None:
  (ticker,) = drawing.matplotlib("ticker")
  place.set_yscale("function", functions=(axis.squash, axis.expand))
  losses = [loss for curve in curves.values() for _, loss in curve]
  worst, best = max([*losses, axis.linear]), min([*losses, 0.0])
  low, high = axis.squash(worst), axis.squash(best)
  room = 0.04 * (low - high)
  place.set_ylim(axis.expand(low + room), axis.expand(high - room))
  steps = [axis.linear * a * 10**b for b in range(6) for a in (1, 2, 5)]
  if axis.linear < 0.1:
    steps = steps[::3]
  ticks = [0.0, *(step for step in steps if step <= worst)]
  place.yaxis.set_major_locator(ticker.FixedLocator(ticks))
  place.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  place.yaxis.set_minor_locator(ticker.NullLocator())
  # Half as much is as far from 1 as twice as much.
  place.set_xscale("log")
  factors = [x for curve in curves.values() for x, _ in curve]
  low, high = min([*factors, 1.0]), max([*factors, 1.0])
  ticks = [t for t in FACTORS if low <= t <= high]
  place.xaxis.set_major_locator(ticker.FixedLocator(_apart(ticks, high / low)))
  place.xaxis.set_minor_locator(ticker.NullLocator())
  place.xaxis.set_major_formatter(ticker.FormatStrFormatter("%gx"))
  place.axvline(1.0, color="#E3E3E3", linewidth=1, zorder=0)
  plain(place)


def heading(
  fig: Any, x: float, y: float, title: str, note: str, *, size: int = 13
) -> None:
  """A title, and a note in grey behind it on the same line."""
  head = fig.text(x, y, title, size=size, weight="bold", color=INK)
  after = (head.get_window_extent().x1 + SPACE) / fig.bbox.width
  fig.text(after, y, note, size=size - 3, color=QUIET)


def plain(place: Any, lines: str = "y") -> None:
  """Lines across for one axis, and no frame."""
  place.grid(axis=lines, color="#EFEFEF", zorder=0)
  place.tick_params(colors=INK, length=0)
  for side in ("top", "right", "left"):
    place.spines[side].set_visible(False)


def _apart(ticks: Sequence[float], span: float) -> list[float]:
  """Ticks of a logarithmic axis that leave room for their labels."""
  chosen: list[float] = []
  for tick in sorted(ticks, key=lambda t: abs(np.log(t))):
    far = [abs(np.log(tick / other)) for other in chosen]
    if min(far, default=np.inf) > 0.1 * np.log(span):
      chosen.append(tick)
  return sorted(chosen)


def names_at_ends(place: Any, ends: Sequence[End]) -> None:
  """Names at the right edge, moved apart; a thin leader from each line.

  Args:
    place: axes whose limits are settled.
    ends: x, y, name, colour, and whether it is bold, of each line's end.
  """
  page = place.transData + place.transAxes.inverted()
  at = [(*page.transform((x, y)), *rest) for x, y, *rest in ends]
  at = _legible(sorted(at, key=lambda end: end[1]))
  heights = spread([end[1] for end in at], GAP)
  for (x, y, name, text, bold), height in zip(at, heights, strict=True):
    place.plot(
      [x + 0.01, 1.0, 1.015], [y, height, height], color=text, linewidth=0.6,
      alpha=0.5, transform=place.transAxes, clip_on=False, zorder=0.4,
    )  # fmt: skip
    place.text(
      1.02, height, name, color=text, size=9, va="center",
      weight="bold" if bold else "normal", transform=place.transAxes,
    )  # fmt: skip


def _legible(ends):
  """Leaves out names in grey until all stand near the ends of their lines."""
  ends = list(ends)
  while True:
    heights = spread([end[1] for end in ends], GAP)
    far = [abs(h - end[1]) for h, end in zip(heights, ends, strict=True)]
    grey = [i for i, end in enumerate(ends) if end[3] == QUIET]
    if not grey or max(far) <= FAR:
      return ends
    worst = max(range(len(ends)), key=lambda i: far[i])
    del ends[min(grey, key=lambda i: abs(i - worst))]


def spread(
  heights: Sequence[float], gap: float, high: float = 1.0
) -> list[float]:
  """Ascending heights moved apart to at least `gap`, as little as possible.

  Neighbours that are too close form a cluster around their mean, which stays
  between 0 and `high`.
  """

  def bottom(cluster: list[float]) -> float:
    length = gap * (len(cluster) - 1)
    return max(0.0, min(float(np.mean(cluster)) - length / 2, high - length))

  clusters: list[list[float]] = []
  for height in heights:
    clusters.append([height])
    while len(clusters) > 1:
      below, above = clusters[-2:]
      if bottom(above) - bottom(below) >= gap * len(below):
        break
      clusters[-2:] = [below + above]
  return [bottom(c) + gap * i for c in clusters for i in range(len(c))]
