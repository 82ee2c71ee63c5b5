"""`maps.png`: what a dense model makes of images, for many methods at once."""

import concurrent.futures
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sweeps.dense_models import DenseModel
from experiments.sweeps.subject import UNREDUCED, Job
from tokjax.analysis import drawing, quick

# Inches of a picture, and methods next to each other.
SIDE, COLUMNS = 0.95, 3
INK, QUIET = "#202020", "#707070"


def draw(
  model: DenseModel,
  jobs: Sequence[Job],
  count: int,
  threads: int,
  path: pathlib.Path,
  notes: Mapping[str, str],
  seen: Mapping[Job, np.ndarray],
) -> None:
  """A strip for each job that the model can be built with, a map an image.

  Args:
    model: with its images.
    jobs: recipes at one keep ratio.
    count: number of images.
    threads: that compile.
    path: the PNG written.
    notes: printed behind the names of methods.
    seen: maps of the first images that are known already.
  """
  images = jnp.asarray(model.images[:count])

  def one(job: Job) -> np.ndarray | None:
    if len(known := seen.get(job, ())) >= count:
      return known[:count, :, :, 0]
    try:
      made = model.build(job.slots())
    except ValueError:  # a row of the results says why
      return None
    apply = quick.jit(
      lambda params, images: made.apply(
        {"params": params}, images, key=jax.random.key(0)
      )[0]
    )
    return np.asarray(apply(model.params, images))[..., 0]

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    found = list(pool.map(one, [UNREDUCED, *jobs]))
  strips: list[tuple[str, str, np.ndarray]] = [
    ("input", "", model.shown(count))
  ]
  for job, maps in zip([UNREDUCED, *jobs], found, strict=True):
    if maps is not None:
      whole = job is UNREDUCED
      name = "unreduced" if whole else job.method
      strips.append((name, notes.get(job.method, ""), maps))
  keep = ", ".join(f"{k:.0%}" for k in dict.fromkeys(job.keep for job in jobs))
  _write(strips, path, f"Maps after restoring; {keep} of the tokens remain")


def _write(
  strips: Sequence[tuple[str, str, np.ndarray]], path: pathlib.Path, title: str
) -> None:
  """Strips of pictures, top to bottom and then to the right."""
  count = len(strips[0][2])
  rows = -(-len(strips) // COLUMNS)
  width, height = COLUMNS * (count * SIDE + 0.35), rows * (SIDE + 0.28) + 0.45
  figure = drawing.figure(figsize=(width, height), dpi=110)
  figure.text(0.12 / width, 1 - 0.28 / height, title, size=11, weight="bold")
  for i, (name, note, pictures) in enumerate(strips):
    left = 0.12 + (i // rows) * (count * SIDE + 0.35)
    top = height - 0.45 - (i % rows) * (SIDE + 0.28)
    figure.text(
      left / width, (top - 0.16) / height, name, size=8.5, color=INK
    )
    figure.text(
      (left + count * SIDE) / width, (top - 0.16) / height, note, size=8,
      color=QUIET, ha="right",
    )  # fmt: skip
    for j, picture in enumerate(pictures):
      x, y = left + j * SIDE, top - 0.2 - SIDE + 0.04
      axes = figure.add_axes(
        (x / width, y / height, (SIDE - 0.04) / width, (SIDE - 0.04) / height)
      )
      axes.imshow(picture, cmap="inferno", vmin=0, vmax=1)
      axes.set_axis_off()
  figure.savefig(path)
