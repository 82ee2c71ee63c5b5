"""Means with their deviations, a line for each setting."""

import math
import pathlib
from collections.abc import Mapping, Sequence

from tokjax.analysis import drawing, plots


def draw(
  values: Mapping[str, tuple[float, float]],
  path: pathlib.Path,
  *,
  title: str,
  note: str = "",
  singles: Mapping[str, Sequence[float]] | None = None,
) -> None:
  """A dot for each mean, a bar of its deviation to both sides.

  Args:
    values: mean and deviation by name; a deviation of NaN has no bar.
    path: the PNG written.
    title, note: in the line above.
    singles: single measurements of each name, small and grey.
  """
  longest = max(len(name) for name in values)
  left, height = 0.3 + 0.078 * longest, 0.95 + 0.27 * len(values)
  width = left + 4.6
  fig = drawing.figure(figsize=(width, height), dpi=110)
  fig.subplots_adjust(
    left=left / width, right=0.97, bottom=0.36 / height,
    top=1 - 0.5 / height,
  )  # fmt: skip
  place = fig.subplots()
  for row, (name, (mean, deviation)) in enumerate(values.items()):
    for single in (singles or {}).get(name, ()):
      place.plot(single, row, "o", color=plots.GREY, markersize=3, zorder=1)
    bar = None if math.isnan(deviation) else deviation
    place.errorbar(
      mean, row, xerr=bar, fmt="o", color=plots.COLOURS[0], markersize=5,
      linewidth=1.6, zorder=2,
    )  # fmt: skip
  place.set_yticks(range(len(values)), list(values))
  place.set_ylim(len(values) - 0.5, -0.5)
  place.tick_params(labelsize=9)
  plots.plain(place, "x")
  plots.heading(fig, 0.1 / width, 1 - 0.28 / height, title, note, size=12)
  fig.savefig(path)
