"""Merge maps of a recipe on photographs, block by block.

python -m experiments.pictures --recipe tome --out DIR
python -m experiments.pictures --recipe evit --image cat.jpg --keep 0.3 \\
  --checkpoint facebook/deit-small-patch16-224 --out DIR

python -m experiments.pictures --recipe fastv --checkpoint FOLDER_OR_RUN \\
  --image cat.jpg --prompt "what is this?" --out DIR

With a prompt, the model is a vision-language model: one picture shows where the
prompt looks and which patches remain, stage by stage. Otherwise, without
images, scikit-learn's two sample photographs; without a checkpoint, a model
that compares colours and is not trained (`tokjax.analysis.stand_in`).
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

from experiments import prompt_pictures
from experiments.sweeps.results import writable
from experiments.sweeps.subject import Job
from tokjax import interop, recipes, zoo
from tokjax.analysis import gallery, merge_map, stand_in
from tokjax.models import DenseViT, ViT, ViTConfig

Path = str | pathlib.Path


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A model, and how images are prepared for it.

  Attributes:
    config, params: its architecture and weights.
    preprocessing: how an image is prepared.
    weights: where they come from, in words.
  """

  config: ViTConfig
  params: Any
  preprocessing: interop.Preprocessing
  weights: str

  def prepare(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """The image as the model takes it, and as uint8 pixels to show."""
    how = self.preprocessing
    x = how(image)
    std, mean = np.float32(how.std), np.float32(how.mean)
    shown = (x * std[None, None] + mean[None, None]) * 255
    return x, shown.round().clip(0, 255).astype(np.uint8)


def encoder(checkpoint: str | None, size: int, patch: int) -> Encoder:
  """A published model, or without one the stand-in for images of `size`.

  Raises:
    ValueError: sizes that do not fit, or a checkpoint that does not state how
      images are prepared.
  """
  if checkpoint is None:
    for name, value in (("size", size), ("patch", patch)):
      if value < 1:
        raise ValueError(f"{name}={value}: must be 1 or more")
    config, params = stand_in.build(size, patch)
    half = (0.5, 0.5, 0.5)
    how = interop.Preprocessing(mean=half, std=half, image_size=size)
    return Encoder(config, params, how, stand_in.NAME)
  model, params, how = interop.load(zoo.resolve(checkpoint))
  if isinstance(model, DenseViT):
    model, params = ViT(model.config.backbone), params["backbone"]
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
  return Encoder(model.config, params, how, f"weights: {checkpoint}")


def photographs(paths: Sequence[Path]) -> dict[str, Image.Image]:
  """Images by a name that no two share; without paths the samples.

  The name is the file's without its ending, and a number where an earlier file
  has it already.

  Raises:
    ValueError: a file that is no image.
    FileNotFoundError: no such file.
  """
  if not paths:
    return sample_photographs()
  out: dict[str, Image.Image] = {}
  names = {pathlib.Path(path).stem for path in paths}
  for path in paths:
    stem = name = pathlib.Path(path).stem
    number = 1
    while name in out or number > 1 and name in names:
      number += 1
      name = f"{stem}-{number}"
    out[name] = _read(path)
  return out


def _read(path: Path) -> Image.Image:
  try:
    with Image.open(path) as image:
      image.load()
  except FileNotFoundError:
    raise
  except OSError as error:
    raise ValueError(
      f"image={str(path)!r}: is no image that can be read ({error})"
    ) from error
  return image


def sample_photographs() -> dict[str, Image.Image]:
  """Scikit-learn's photographs by name."""
  found = datasets.load_sample_images()
  return {
    pathlib.Path(name).stem: Image.fromarray(image)
    for name, image in zip(found.filenames, found.images, strict=True)
  }


def main(
  recipe: str,
  out: Path,
  *,
  images: Sequence[Path] = (),
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
    out: directory of the PNGs, one for each image.
    images: files; empty: the sample photographs.
    checkpoint: folder, hub id or name of `tokjax models`; None: the stand-in.
    keep: fraction of tokens that remain; None: the recipe's own schedule.
    blocks: which to show, from 1; empty: all.
    size, patch: of the stand-in's image and patches, in pixels.
    seed: of random recipes.

  Returns:
    The files written, in the order of the images: `NAME_RECIPE.png`, see
    `photographs` for the name.

  Raises:
    ValueError: an unknown recipe, a keep ratio, block, size, image or folder
      that cannot be; the message names the argument.
    FileNotFoundError: no such image or checkpoint.
  """
  slots = Job(recipe, keep).slots()
  model = encoder(checkpoint, size, patch)
  module = ViT(model.config, slots)
  depth = model.config.depth
  shown = tuple(blocks) or tuple(range(1, depth + 1))
  if bad := [block for block in shown if not 1 <= block <= depth]:
    raise ValueError(f"blocks={shown}: {bad} are not in 1..{depth}")
  share = "its own schedule" if keep is None else f"keep {keep:g}"
  about = recipes.find(recipe).paper
  found, out = photographs(images), writable(out, "out")
  written = []
  for name, image in found.items():
    x, pixels = model.prepare(image)
    groups = merge_map.look(
      module, model.params, jnp.asarray(x[None]), jax.random.key(seed)
    )
    captions = [
      (f"block {b}  {groups[b - 1].num_tokens[0]} tokens", groups[b - 1])
      for b in shown
    ]
    path = out / f"{name}_{recipe}.png"
    gallery.draw_blocks(
      pixels, captions, path, title=recipe, below=about,
      note=f"{share}; {model.weights}",
    )  # fmt: skip
    written.append(path)
  return written


def from_command_line(given: Any) -> None:
  """`main` with the options of the command."""
  if given.prompt is not None:
    written = of_prompt(given)
  else:
    written = of_images(given)
  for path in written:
    print(path)


def of_prompt(given: Any) -> list[pathlib.Path]:
  """Pictures of a vision-language model.

  Raises:
    ValueError: no checkpoint, or an option for models of images alone.
  """
  if given.checkpoint is None:
    raise ValueError("prompt: needs --checkpoint, a folder or a run")
  if given.block:
    raise ValueError("prompt: takes no --block; every stage is shown")
  return prompt_pictures.main(
    given.recipe, given.out, images=given.image or (),
    source=given.checkpoint, prompt=given.prompt, keep=given.keep,
  )  # fmt: skip


def of_images(given: Any) -> list[pathlib.Path]:
  """Merge maps of a vision encoder."""
  return main(
    given.recipe, given.out, images=given.image or (),
    checkpoint=given.checkpoint, keep=given.keep, blocks=given.block or (),
    size=given.size, patch=given.patch,
  )  # fmt: skip


if __name__ == "__main__":
  from experiments import launch
  from experiments.command import Command, Option

  launch.start(
    Command(
      __doc__ or "",
      (
        Option("recipe", str, None, "See `tokjax recipes`.", required=True),
        Option("out", str, None, "Folder of the pictures.", required=True),
        Option("image", str, None, "A file; None: two photographs.", many=True),
        Option("checkpoint", str, None, "Folder, hub id, `tokjax models`."),
        Option("prompt", str, None, "About each image; for models of both."),
        Option("keep", float, 0.2, "Fraction of tokens that remain."),
        Option("block", int, None, "To show, from 1; None: all.", many=True),
        Option("size", int, 384, "Of the image, without a checkpoint."),
        Option("patch", int, 16, "Of a patch, without a checkpoint."),
        Option("traceback", bool, False, "Show where an error comes from."),
      ),
    ),
    from_command_line,
  )
