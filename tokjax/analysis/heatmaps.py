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
  """One map for each method, dark where nothing is recalled.

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
  fig = drawing.figure(
    figsize=(1.9 * columns + 0.8, 1.35 * rows + 0.7),
    dpi=110,
    layout="constrained",
  )
  fig.suptitle(title, size=11, weight="bold", color=INK)
  places = fig.subplots(rows, columns, squeeze=False)
  for place in places.ravel()[len(maps) :]:
    place.set_visible(False)
  for i, (name, values) in enumerate(maps.items()):
    place = places.ravel()[i]
    grid = np.asarray(values, float)
    place.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    place.set_title(f"{name}  {grid.mean():.0%}", size=8, color=INK)
    place.set_xticks(range(len(depths)), [f"{d:.0%}" for d in depths])
    place.set_yticks(range(len(lengths)), [str(n) for n in lengths])
    place.tick_params(labelsize=6, length=0, colors=INK)
    if i % columns == 0:
      place.set_ylabel("tokens", size=7, color=INK)
    if i >= len(maps) - columns:
      place.set_xlabel("depth of the needle", size=7, color=INK)
  fig.savefig(path)
