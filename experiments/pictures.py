"""Merge maps of a recipe on photographs, block by block.

python -m experiments.pictures --recipe tome --out DIR
python -m experiments.pictures --recipe evit --image cat.jpg --keep 0.3 \
  --checkpoint facebook/deit-small-patch16-224 --out DIR

Without images, scikit-learn's two sample photographs; without a checkpoint, a
model that compares colours and is not trained (`tokjax.analysis.stand_in`).
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from sklearn import datasets

from tokjax import interop, recipes
from tokjax.analysis import gallery, merge_map, stand_in
from tokjax.models import ViT, ViTConfig

Pixels = np.ndarray


@dataclasses.dataclass(frozen=True)
class Looker:
  """A model that looks at pictures.

  Attributes:
    config, params: its architecture and weights.
    how: how an image is prepared.
    weights: where they come from, in words.
  """

  config: ViTConfig
  params: Any
  how: interop.Preprocessing
  weights: str

  def prepare(self, image: Image.Image) -> tuple[np.ndarray, Pixels]:
    """The image as the model takes it, and as a person sees that."""
    x = self.how(image)
    std, mean = np.float32(self.how.std), np.float32(self.how.mean)
    seen = (x * std[None, None] + mean[None, None]) * 255
    return x, seen.round().clip(0, 255).astype(np.uint8)


def looker(checkpoint: str | None, size: int, patch: int) -> Looker:
  """A published model, or without one the stand-in for images of `size`."""
  if checkpoint is None:
    config, params = stand_in.build(size, patch)
    half = (0.5, 0.5, 0.5)
    how = interop.Preprocessing(mean=half, std=half, image_size=size)
    return Looker(config, params, how, stand_in.NAME)
  model, params, how = interop.load(checkpoint)
  if not isinstance(model, ViT):
    raise ValueError(
      f"checkpoint={checkpoint!r}: is a {type(model).__name__}, no model of"
      " images"
    )
  if how is None:
    raise ValueError(
      f"checkpoint={checkpoint!r}: the folder does not state how images are"
      " prepared; add a preprocessor_config.json"
    )
  return Looker(model.config, params, how, f"weights: {checkpoint}")


def sample_photographs() -> dict[str, Image.Image]:
  """Scikit-learn's photographs by name."""
  found = datasets.load_sample_images()
  return {
    pathlib.Path(name).stem: Image.fromarray(image)
    for name, image in zip(found.filenames, found.images, strict=True)
  }


def main(
  recipe: str,
  out: str | pathlib.Path,
  *,
  images: Sequence[str | pathlib.Path] = (),
  checkpoint: str | None = None,
  keep: float | None = 0.2,
  blocks: Sequence[int] = (),
  size: int = 384,
  patch: int = 16,
  seed: int = 0,
) -> list[pathlib.Path]:
  """Draws the merge maps of a recipe.

  Args:
    recipe: see `tokjax.recipes.names()`.
    out: directory of the PNGs, one an image.
    images: files; empty: the sample photographs.
    checkpoint: folder or hub id; None: the stand-in.
    keep: fraction of tokens that remain; None: the recipe's own schedule.
    blocks: which to show, from 1; empty: all.
    size, patch: of the stand-in's image and patches, in pixels.
    seed: of random recipes.

  Returns:
    The files written.
  """
  slots = recipes.get(recipe, **({} if keep is None else {"keep": keep}))
  model = looker(checkpoint, size, patch)
  module = ViT(model.config, slots)
  depth = model.config.depth
  shown = tuple(blocks) or tuple(range(1, depth + 1))
  if bad := [block for block in shown if not 1 <= block <= depth]:
    raise ValueError(f"blocks={shown}: {bad} are not in 1..{depth}")
  photographs = {
    pathlib.Path(path).stem: Image.open(path) for path in images
  } or sample_photographs()
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  written = []
  for name, image in photographs.items():
    x, seen = model.prepare(image)
    found = merge_map.look(
      module, model.params, jnp.asarray(x[None]), jax.random.key(seed)
    )
    captions = [
      (f"block {b}  {found[b - 1].num_tokens[0]} tokens", found[b - 1])
      for b in shown
    ]
    path = out / f"{name}_{recipe}.png"
    gallery.draw_blocks(seen, captions, path, title=recipe, note=model.weights)
    written.append(path)
  return written


if __name__ == "__main__":
  from absl import app, flags

  flags.DEFINE_string("recipe", None, "see python -m tokjax.recipes")
  flags.DEFINE_string("out", None, "directory of the pictures")
  flags.DEFINE_multi_string("image", [], "a file; may be repeated")
  flags.DEFINE_string("checkpoint", None, "folder or hub id")
  flags.DEFINE_float("keep", 0.2, "fraction of tokens that remain")
  flags.DEFINE_multi_integer("block", [], "to show, from 1; may be repeated")
  flags.DEFINE_integer("size", 384, "of the image, without a checkpoint")
  flags.DEFINE_integer("patch", 16, "of a patch, without a checkpoint")
  flags.mark_flags_as_required(["recipe", "out"])

  def start(_):
    """Calls `main` with the flags."""
    f = flags.FLAGS
    for path in main(
      f.recipe, f.out, images=f.image, checkpoint=f.checkpoint, keep=f.keep,
      blocks=f.block, size=f.size, patch=f.patch,
    ):  # fmt: skip
      print(path)

  app.run(start)
