"""Merge maps of vision methods, on a photograph of scikit-learn.

The model is `tokjax.analysis.stand_in`, which compares colours and is not
trained: what a rule does is seen, and nothing of accuracy.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.crops import centre
from experiments.pictures import sample_photographs
from tokjax import recipes
from tokjax.analysis import gallery, merge_map, stand_in
from tokjax.models import ViT
from tokjax.slots import Slots

SIZE, PATCH, DEPTH, KEEP = 192, 12, 6, 0.25
SHOWN = (2, 4, 6)
# Of a model with so few blocks, and a grid of 16 x 16 patches.
OPTIONS = {"vtc_cls": {"blocks": DEPTH // 2}, "mustdrop": {"side": 4}}
CAPTION = (
  "The photograph, and where its patches are after some blocks. Patches that"
  " became one token share their mean colour and an outline; dark patches were"
  " dropped. The model compares colours and is not trained: it shows what the"
  f" rule does with {KEEP:.0%} of the tokens kept, and nothing about accuracy."
)

AT_END = (
  " The method chooses among the features of an image for a language model: it"
  " is shown at the end of that encoder."
)


def slots_of(recipe: recipes.Recipe) -> Slots | None:
  """What an encoder can carry out of a method; None: there is nothing.

  Of a method for vision-language models, what chooses among the features of an
  image is shown at the end of an encoder.
  """
  slots = recipe(keep=KEEP, **OPTIONS.get(recipe.name, {}))
  if recipe.family == "vlm":
    parts = [r for _, tower in slots.towers for r in tower.reduce]
    slots = Slots(
      tuple(dataclasses.replace(r, at="output", back=None) for r in parts),
      name=recipe.name,
    )
  if recipe.family not in ("baseline", "vision", "vlm"):
    return None
  if any(r.learned is not None for r in slots.reduce):
    return None
  if not slots.reduce and slots.program is None:
    return None
  return slots


def draw(recipe: recipes.Recipe, path: pathlib.Path) -> bool:
  """Writes the picture of a method; False: it has none."""
  slots = slots_of(recipe)
  if slots is None:
    return False
  config, params = stand_in.build(SIZE, PATCH, DEPTH)
  pixels = photograph()
  groups = merge_map.look(
    ViT(config, slots),
    params,
    jnp.asarray(pixels[None] / 127.5 - 1, jnp.float32),
    jax.random.key(0),
  )
  named = [
    (f"block {b}  {groups[b - 1].num_tokens[0]} tokens", groups[b - 1])
    for b in (SHOWN if recipe.family != "vlm" else SHOWN[-1:])
  ]
  gallery.draw_blocks(pixels, named, path, title=recipe.name)
  return True


def photograph() -> np.ndarray:
  """A dahlia, uint8 `[SIZE, SIZE, 3]`."""
  return np.asarray(centre(sample_photographs()["flower"], SIZE, 1.0))
