"""Pictures of a prompt: which patches of its image remain, stage by stage."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments import image_prompts, visual_tokens
from experiments.image_prompts import ImageModel, Path
from experiments.sweeps.results import writable
from experiments.sweeps.subject import Job
from tokjax.analysis import drawing, gallery, merge_map
from tokjax.models import VisionLanguageGenerator
from tokjax.slots import Slots

INK = "#202020"
LEAST = 240  # Pixels of the shorter side of an image that is drawn.
COLUMNS = 6


def main(
  recipe: str,
  out: Path,
  *,
  images: Sequence[Path],
  source: Path,
  prompt: str,
  keep: float | None = 0.2,
  seed: int = 0,
) -> list[pathlib.Path]:
  """Draws what a recipe leaves of the image of a prompt.

  The first line shows where the last token of the prompt looks in each block of
  the unreduced language model, the second the patches that remain after each
  stage of the recipe.

  Args:
    recipe: see `tokjax.recipes.names()`.
    out: directory of the PNGs.
    images: files; the prompt is about each of them alone.
    source: a checkpoint of a vision-language model, or the workdir of a run.
    prompt: with one placeholder `<image>`, or none.
    keep: fraction of the visual tokens that remain; None: the recipe's own.
    seed: of random recipes.

  Returns:
    The files written, in the order of the images: `NAME_RECIPE.png`.

  Raises:
    ValueError: no image, a recipe that the model or a picture cannot take, an
      image that cannot be read; the message names the argument.
  """
  slots = Job(recipe, keep).slots()
  if not images:
    raise ValueError("image: give at least one file that the prompt is about")
  found = [image_prompts.read_image(path) for path in images]
  lm = image_prompts.load(source)
  if lm.config.pinpoints:
    raise ValueError(
      f"checkpoint={str(source)!r}: cuts images into crops, which pictures do"
      " not show"
    )
  model, ids = lm.build(slots), lm.encode(prompt, 1)
  share = "its own budget" if keep is None else f"keep {keep:g}"
  folder, written = writable(out, "out"), []
  for path, image in zip(images, found, strict=True):
    pixels = lm.preprocessing(image)
    attention = visual_tokens.attention(
      lm.config, lm.params, _packed(lm, lm.build(Slots()), ids, pixels)
    )
    stages = visual_tokens.look(
      model, lm.params, _packed(lm, model, ids, pixels), jax.random.key(seed)
    )
    to = folder / f"{pathlib.Path(path).stem}_{recipe}.png"
    # Of two encoders the first one's.
    seen = np.asarray(pixels)[..., : lm.config.vision.channels]
    shown = merge_map.displayable(seen[None])[0]
    title = f"{recipe}, {share}: {prompt}"
    draw(shown, attention, stages, lm.config.vision.grid, to, title)
    written.append(to)
  return written


def _packed(lm: ImageModel, model: Any, ids: Sequence[int], pixels: Any):
  """The prompt at its own length."""
  length = lm.config.language.length
  generator = VisionLanguageGenerator(
    model, lm.params, length, 1, buckets=tuple(range(1, length))
  )
  return generator.pack([ids], [[pixels]])[0]


def draw(
  image: np.ndarray,
  attention: np.ndarray,
  stages: Sequence[visual_tokens.Stage],
  grid: tuple[int, int],
  path: pathlib.Path,
  title: str,
) -> None:
  """Writes a picture.

  Args:
    image: what the model saw, uint8 `[height, width, c]`.
    attention: see `visual_tokens.attention`, of one prompt.
    stages: see `visual_tokens.look`, of one prompt.
    grid: rows and columns of patches.
    path: the PNG.
    title: in the line above.
  """
  image = gallery.enlarge(image, LEAST)
  panels = [("input", image)]
  for i, (row,) in enumerate(attention):
    name = f"attention of the last token,\nblock {i + 1}: {row.sum():.0%}"
    panels.append((name, _heat(image, row.reshape(grid))))
  panels += [("", None)] * (-len(panels) % min(COLUMNS, len(panels)))
  columns = min(COLUMNS, len(panels))
  for stage in stages:
    groups = stage.groups(grid)
    whole = merge_map.paint(image, groups.index[0], groups.share[0])
    few = f"{groups.num_tokens[0]} tokens"
    panels.append((f"{stage.name}\n{few}", whole))
  rows = -(-len(panels) // columns)
  fig = drawing.figure(
    figsize=(2.3 * columns, 2.65 * rows + 0.5), dpi=110, layout="constrained"
  )
  fig.suptitle(title, size=10, color=INK)
  places = fig.subplots(rows, columns, squeeze=False).ravel()
  for place in places:
    place.set_axis_off()
  for place, (name, picture) in zip(places, panels, strict=False):
    if picture is not None:
      place.imshow(picture, interpolation="nearest")
      place.set_title(name, size=8, color=INK)
  fig.savefig(path)


def _heat(image: np.ndarray, share: np.ndarray) -> np.ndarray:
  """The image, darker where a patch gets less than the most attended one."""
  tall, wide = (n // m for n, m in zip(image.shape, share.shape, strict=False))
  light = share / max(share.max(), 1e-9)
  light = light.repeat(tall, axis=0).repeat(wide, axis=1)[..., None]
  ground = np.array([255.0, 140.0, 0.0])
  mixed = 0.35 * image.mean(axis=-1, keepdims=True) + light * ground
  return mixed.clip(0, 255).astype(np.uint8)
