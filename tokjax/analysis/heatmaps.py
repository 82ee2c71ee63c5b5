"""Heat maps side by side: recall by depth and length, method by method."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from tokjax.analysis import drawing

INK = "#262626"
COLUMNS = 6


def draw_recall(
  maps: Mapping[str, Sequence[Sequence[float]]],
  lengths: Sequence[int],
  depths: Sequence[float],
  path: pathlib.Path,
  *,
  title: str,
) -> None:
  """One map for each method with its numbers, and one key to the colours.

  Args:
    maps: shares of right answers, a row for each length and a column for each
      depth.
    lengths: tokens of the contexts.
    depths: places of the needle, 0 the beginning.
    path: the PNG written.
    title: in the line above.
  """
  if not maps:
    raise ValueError("maps: there is no method to draw")
  columns = min(COLUMNS, len(maps))
  rows = -(-len(maps) // columns)
  wide = max(1.9, 0.34 * len(depths) + 0.5)
  tall = max(1.35, 0.22 * len(lengths) + 0.75)
  fig = drawing.figure(
    figsize=(wide * columns + 1.3, tall * rows + 0.7),
    dpi=110,
    layout="constrained",
  )
  fig.suptitle(title, size=11, weight="bold", color=INK)
  places = fig.subplots(rows, columns, squeeze=False)
  for place in places.ravel()[len(maps) :]:
    place.set_visible(False)
  shown = []
  for i, (name, values) in enumerate(maps.items()):
    place = places.ravel()[i]
    grid = np.asarray(values, float)
    shown.append(
      place.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    )
    _numbers(place, grid)
    place.set_title(f"{name}  {grid.mean():.0%}", size=8, color=INK)
    place.set_xticks(range(len(depths)), [f"{d:.0%}" for d in depths])
    place.set_yticks(range(len(lengths)), [str(n) for n in lengths])
    place.tick_params(labelsize=6, length=0, colors=INK)
    if i % columns == 0:
      place.set_ylabel("tokens", size=7, color=INK)
    if i >= len(maps) - columns:
      place.set_xlabel("depth of the needle", size=7, color=INK)
  bar = fig.colorbar(shown[0], ax=places, shrink=0.6, aspect=30, pad=0.015)
  bar.set_label("share of right answers", size=7, color=INK)
  bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
  bar.ax.tick_params(labelsize=6, length=0, colors=INK)
  bar.outline.set_visible(False)
  fig.savefig(path)


def _numbers(place, grid: np.ndarray) -> None:
  """Percent in every cell, dark on bright and bright on dark."""
  for (row, column), value in np.ndenumerate(grid):
    place.text(
      column, row, f"{100 * value:.0f}", size=5.5, ha="center", va="center",
      color=INK if value > 0.6 else "#F2F2F2",
    )  # fmt: skip
