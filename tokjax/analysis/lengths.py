"""Time against length: a line for each method, its name at its end."""

import pathlib
from collections.abc import Mapping, Sequence

from tokjax.analysis import drawing, plots


def draw(
  curves: Mapping[str, Sequence[tuple[int, float]]],
  path: pathlib.Path,
  *,
  title: str,
  note: str = "",
  reference: str,
  x_label: str,
  y_label: str,
) -> None:
  """Both axes are logarithmic; lengths read 1k, 4k, 128k.

  Args:
    curves: (tokens, time) points of each method.
    path: the PNG written.
    title, note: in the line above.
    reference: a method drawn dashed, in black.
    x_label, y_label: of the axes, with the unit.
  """
  (ticker,) = drawing.matplotlib("ticker")
  fig = drawing.figure(figsize=(7.2, 4.4), dpi=110)
  # Room for the longest name.
  right = min(0.8, 0.94 - 0.0125 * max(map(len, curves)))
  fig.subplots_adjust(left=0.1, right=right, top=0.86, bottom=0.12)
  place = fig.subplots()
  place.set_xscale("log", base=2)
  place.set_yscale("log")
  ends, colours = [], iter(plots.COLOURS)
  for name, points in curves.items():
    x, y = zip(*sorted(points), strict=True)
    dashed = name == reference
    colour = plots.INK if dashed else next(colours, plots.QUIET)
    kind, width = ((0, (4, 2)), 1.4) if dashed else ("-", 2.0)
    place.plot(
      x, y, linestyle=kind, color=colour, linewidth=width, marker="o",
      markersize=4,
    )  # fmt: skip
    ends.append((x[-1], y[-1], name, colour, not dashed))
  lengths = sorted({x for points in curves.values() for x, _ in points})
  place.xaxis.set_major_locator(ticker.FixedLocator(lengths))
  place.xaxis.set_major_formatter(lambda value, _: _thousands(round(value)))
  place.xaxis.set_minor_locator(ticker.NullLocator())
  place.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
  place.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
  place.yaxis.set_minor_locator(ticker.NullLocator())
  plots.plain(place)
  place.set_xlabel(x_label, color=plots.INK)
  place.set_ylabel(y_label, color=plots.INK)
  # Limits follow the lines only when asked for.
  place.set_xlim(place.get_xlim())
  place.set_ylim(place.get_ylim())
  plots.names_at_ends(place, ends)
  plots.heading(fig, 0.02, 0.93, title, note)
  fig.savefig(path)


def _thousands(tokens: int) -> str:
  """1024 is 1k, 131072 is 128k, 500 is 500."""
  return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
