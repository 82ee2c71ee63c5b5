"""Text from a prompt with images, with any recipe, and what it costs."""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments import typed
from experiments.drafted import Stream
from experiments.evaluate import restore_run
from experiments.generated import Generated
from experiments.prompts import Answer, Prompt
from experiments.request import Generate
from experiments.timed_answers import Show, run, warm_up
from experiments.training import config as config_lib
from experiments.training import mesh as mesh_lib
from experiments.training import published, trees
from tokjax import interop, zoo
from tokjax.models import (
  VisionLanguage,
  VisionLanguageConfig,
  VisionLanguageGenerator,
  vlm_generation,
)
from tokjax.slots import Slots

PLACEHOLDER = "<image>"
# An empty word, as tokenizers of Llama write it.
EMPTY = "\N{LOWER ONE EIGHTH BLOCK}"
Path = str | pathlib.Path


@dataclasses.dataclass(frozen=True)
class ImageModel:
  """A model of images and text, and how both are prepared for it.

  Attributes:
    config, params: its architecture and weights.
    dtype: of activations and caches.
    tokenizer: text to ids and back.
    preprocessing: from an image to what the model takes.
    origin: where the weights come from, in words.
    actions: what tokens stand for in a model of actions; None: it is none.
    image_second: images stand behind the first token.
  """

  config: VisionLanguageConfig
  params: Any
  dtype: Any
  tokenizer: Any
  preprocessing: Any
  origin: str
  actions: Any = None
  image_second: bool = False

  def build(self, slots: Slots) -> VisionLanguage:
    """The model with these slots.

    Raises:
      ConfigError: the recipe learns something that is not among the weights.
      ValueError: the model cannot carry the recipe out.
    """
    model = VisionLanguage(self.config, slots, self.dtype)
    trees.check_complete(slots.name, model, self.params)
    return model

  def encode(self, text: str, images: int, chat: bool = False) -> list[int]:
    """Ids of a prompt; images stand in front of a text that places none.

    Raises:
      ValueError: not as many placeholders as images, or a tokenizer that does
        not know the placeholder.
    """
    if self.image_second:
      return self._encode_second(text, images, chat)
    if PLACEHOLDER not in text:
      text = f"{(PLACEHOLDER + chr(10)) * images}{text}"
    if (holders := text.count(PLACEHOLDER)) != images:
      raise ValueError(
        f"prompt: has {holders} placeholders {PLACEHOLDER} for {images} images;"
        " put one where each image belongs, or none at all to have the images"
        " in front"
      )
    ids = Prompt(text).encode(self.tokenizer, chat)
    if ids.count(self.config.image_token) != images:
      raise ValueError(
        f"prompt: {PLACEHOLDER} is not the id {self.config.image_token} to the"
        f" tokenizer of {self.origin}, by which the model knows images"
      )
    return ids

  def _encode_second(self, text: str, images: int, chat: bool) -> list[int]:
    """Ids of a prompt whose images stand behind the first token.

    A model of actions was trained on prompts that end with the empty token, if
    its tokenizer has one (`predict_action` of OpenVLA).
    """
    if PLACEHOLDER in text:
      raise ValueError(
        f"prompt: has a placeholder {PLACEHOLDER}; images of {self.origin}"
        " stand behind the first token of a prompt, leave it out"
      )
    ids = Prompt(text).encode(self.tokenizer, chat)
    empty = self.tokenizer.published.token_to_id(EMPTY)
    if self.actions is not None and empty is not None and ids[-1:] != [empty]:
      ids = [*ids, empty]
    return [*ids[:1], *[self.config.image_token] * images, *ids[1:]]


def load(source: Path) -> ImageModel:
  """The model of a finished run or of a published checkpoint.

  Raises:
    ConfigError: a model that takes no images, or a checkpoint without tokenizer
      or preprocessing.
  """
  if published.is_run(str(source)):
    return _of_run(source)
  where = f"checkpoint={str(source)!r}"
  model, params, inputs = interop.load(zoo.resolve(str(source)))
  if not isinstance(model, VisionLanguage):
    raise typed.ConfigError(
      f"{where}: is a {type(model).__name__}, which takes no images and text"
    )
  for name in ("tokenizer", "preprocessing"):
    if getattr(inputs, name) is None:
      raise typed.ConfigError(
        f"{where}: the folder has no {name}; put that of the checkpoint next to"
        " its weights"
      )
  return ImageModel(
    model.config, params, model.dtype, inputs.tokenizer, inputs.preprocessing,
    str(source), inputs.actions, inputs.image_second,
  )  # fmt: skip


def _of_run(source: Path) -> ImageModel:
  mesh = mesh_lib.Mesh().build()
  config, params, step = restore_run(source, mesh)
  if not isinstance(config.model, VisionLanguageConfig):
    raise typed.ConfigError(
      f"run {str(source)!r}: is of a {type(config.model).__name__}, which takes"
      " no images and text"
    )
  return ImageModel(
    config.model, params, config_lib.DTYPES[config.precision],
    config.data.words, config.data.preprocessing, f"{source}, step {step}",
  )  # fmt: skip


def read_image(path: Path) -> Image.Image:
  """An image file.

  Raises:
    ValueError: there is none, or it cannot be read.
  """
  try:
    with Image.open(path) as image:
      image.load()
  except (OSError, Image.DecompressionBombError) as error:
    raise ValueError(
      f"image={str(path)!r}: is no image that can be read ({error})"
    ) from error
  return image


def answer(
  config: Generate,
  source: Path,
  prompt: str,
  images: Sequence[Path],
  show: Show | None,
) -> Generated:
  """What follows a prompt.

  Args:
    config: how.
    source: see `load`.
    prompt: with a placeholder for each image, or with none.
    images: files, in the order of the placeholders.
    show: is given the text piece by piece; None: nobody is.

  Raises:
    ValueError: see `ImageModel.encode` and `read_image`.
  """
  slots = config.recipe.slots()
  found = [read_image(path) for path in images]
  lm = load(source)
  config = for_actions(config, lm)
  ids = lm.encode(prompt, len(found), config.chat)
  print(f"model: {lm.origin}", file=sys.stderr, flush=True)
  generator = VisionLanguageGenerator(
    lm.build(slots), lm.params, config.capacity or lm.config.language.length,
    config.tokens, chunk=config.chunk,
  )  # fmt: skip
  pixels = [lm.preprocessing(image) for image in found]
  packed, _ = generator.pack([ids], [pixels])
  stream = Stream(generator, config)
  inputs = ([ids], [pixels], jax.random.key(config.seed))
  ends = lm.tokenizer.ends if lm.actions is None else ()
  text = Answer(lm.tokenizer.decode, ends, config.stop)
  compiled, sizes = warm_up(stream, *inputs)
  first, rate = run(stream, [text], show, *inputs)
  action = ()
  if lm.actions is not None:
    action = tuple(lm.actions.decode(text.ids, config.dataset).tolist())
  return Generated(
    text.text, tuple(text.ids), first, rate, compiled,
    float(np.asarray(sizes.logical).mean()), sizes.physical,
    full_bytes(lm, generator, ids, pixels), prompt, int(packed.length[0]),
    text.stopped, action, stream.per_step,
  )  # fmt: skip


def for_actions(config: Generate, lm: ImageModel) -> Generate:
  """The configuration, of a model of actions with one token a dimension.

  Raises:
    ConfigError: an option that such a model does not follow, or one that is for
      such a model only.
    ValueError: see `Actions.scale`.
  """
  if lm.actions is None:
    if config.dataset is not None:
      raise typed.ConfigError(
        f"dataset={config.dataset!r}: {lm.origin} is no model of actions; leave"
        " it out"
      )
    return config
  if config.stop:
    raise typed.ConfigError(
      f"stop={config.stop}: {lm.origin} gives as many tokens as an action has"
      " dimensions; leave it out"
    )
  return dataclasses.replace(
    config, tokens=lm.actions.dimensions(config.dataset)
  )


def full_bytes(
  lm: ImageModel,
  generator: VisionLanguageGenerator,
  ids: Sequence[int],
  pixels: Sequence[Any],
) -> int:
  """Bytes of the unreduced model's cache; nothing is computed."""
  plain = dataclasses.replace(generator, model=lm.build(Slots()))
  packed, room = plain.pack([ids], [pixels])

  def states(params, prompts):
    going = vlm_generation.prefill(
      plain.model, params, prompts, plain.decode, None, room
    )
    return jax.tree.leaves(going.states)

  leaves = jax.eval_shape(states, lm.params, packed)
  return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)
