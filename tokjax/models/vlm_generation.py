"""Prompts with images to text, over ragged batches.

There is one compilation for each set of buckets: of the padded length of a
prompt, of the images of the batch, and of those of the prompt that has most and
of the one that has fewest.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from tokjax.models import generation, vlm_native, vlm_prompts, vlm_seen
from tokjax.models import prefill as prompting
from tokjax.models.decoder_slots import Capacities, kind_capacities
from tokjax.models.generation import BUCKETS, Generation, Generator
from tokjax.models.native_patches import NativeResolutionConfig
from tokjax.models.vlm import Prompts, VisionLanguage
from tokjax.models.vlm_prompts import Ids, Images
from tokjax.models.vlm_slots import tokens_per_image
from tokjax.slots import Bytes
from tokjax.tokens import Kind

IMAGE_BUCKETS = (1, 2, 3, *(2**i for i in range(2, 11)))


def prefill(
  model: VisionLanguage,
  params: Any,
  prompts: Prompts,
  decode: int,
  chunk: int | None = None,
  room: Capacities | None = None,
  key: PRNGKeyArray | None = None,
) -> Generation:
  """Takes prompts with images.

  Args:
    model: built with slots (static).
    params: its parameters.
    prompts: padded, see `tokjax.models.vlm_prompts`.
    decode: how many tokens can follow (static).
    chunk: tokens taken at a time (static); None: all.
    room: the most tokens of each kind that a prompt has (static).
    key: for recipes that are random.

  Returns:
    What `tokjax.models.generation.decode_step` goes on with, for
    `model.decoder` and `params["language"]`.
  """
  rows, alive, ahead = _enter(model, params, prompts, key)
  done = prompting.prefill_rows(
    model.decoder, params["language"], rows, decode, chunk, room
  )
  return Generation(
    done.states, done.logits, done.position, alive, done.shifts, ahead,
    done.passage,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _enter(model: VisionLanguage, params: Any, prompts: Prompts, key):
  rows: Any = model.apply({"params": params}, prompts, key, method="enter")
  ahead = prompts.following
  if ahead is not None:
    ahead = ahead - rows.valid.sum(axis=1, dtype=jnp.int32)
  return rows, prompts.length > 0, ahead


prefill_whole = jax.jit(prefill, static_argnums=(0, 3, 4, 5))


@dataclasses.dataclass(frozen=True)
class VisionLanguageGenerator:
  """A vision-language model with parameters and room for prompts and answers.

  Attributes:
    model: built with slots.
    params: its parameters.
    capacity: the longest prompt, in tokens, those of its images included.
    decode: how many tokens can be generated.
    buckets: lengths that prompts are padded to, ascending.
    image_buckets: numbers of images (where they are cut, of crops) that a batch
      is padded to, ascending.
    size_buckets: sizes in visual tokens that images of native resolution are
      padded to, ascending.
    chunk: tokens of a prompt taken at a time; None: all.
    language: the generator of the language model.
  """

  model: VisionLanguage
  params: Any
  capacity: int
  decode: int
  buckets: tuple[int, ...] = BUCKETS
  image_buckets: tuple[int, ...] = IMAGE_BUCKETS
  size_buckets: tuple[int, ...] = vlm_native.BUCKETS
  chunk: int | None = None
  language: Generator = dataclasses.field(init=False, repr=False)

  def __post_init__(self):
    if not self.image_buckets or min(self.image_buckets) < 1:
      raise ValueError(
        f"image_buckets={self.image_buckets}: must be numbers of 1 or more"
      )
    language = Generator(
      self.model.decoder, self.params["language"], self.capacity, self.decode,
      self.buckets, self.chunk,
    )  # fmt: skip
    object.__setattr__(self, "language", language)

  @property
  def image_tokens(self) -> int:
    """Visual tokens of one crop, as they enter the language model."""
    return tokens_per_image(self.model.config, self.model.slots)

  def pack(
    self, prompts: Sequence[Ids], images: Sequence[Images]
  ) -> tuple[Prompts, Capacities]:
    """Padded prompts, and the room that they need for each kind.

    Raises:
      ValueError: not as many placeholders as images, an image of another size
        than the model's, or a prompt that `Generator.pack` refuses.
    """
    config = self.model.config
    if isinstance(config.vision, NativeResolutionConfig):
      return vlm_native.pack(
        self.language, config, self.model.slots, prompts, images,
        self.size_buckets, self.image_bucket(vlm_native.parts_of(images)),
      )  # fmt: skip
    count = self.image_tokens
    crops = [[vlm_prompts.crops_of(x, config) for x in own] for own in images]
    layouts = [
      [vlm_prompts.layout_of(x, config, count) for x in own] for own in crops
    ]
    tokens, length = self.language.pack(
      vlm_prompts.expand(prompts, layouts, config.image_token)
    )
    sizes = [sum(len(x.pixels) for x in own) for own in crops]
    packed = vlm_prompts.pack(
      tokens, length, [x for own in crops for x in own],
      [x for own in layouts for x in own], config.image_token, count,
      self.image_bucket(sum(sizes)),
      [vlm_prompts.weights_of(x, config, count) for own in crops for x in own],
    )  # fmt: skip
    if vlm_seen.asks_origin(self.model.slots):
      origins = [
        [
          vlm_prompts.origins_of(x, config, layout, i)
          for i, (x, layout) in enumerate(zip(*own, strict=True))
        ]
        for own in zip(crops, layouts, strict=True)
      ]
      packed = vlm_prompts.with_origins(packed, origins)
    real = np.arange(tokens.shape[1])[None] < length[:, None]
    room = dict(
      kind_capacities(np.where(real, packed.kind, -1), self.language.bucket)
    )
    if Kind.VISUAL in room:
      # Closer than a bucket of tokens, so that reductions of them save more.
      room[Kind.VISUAL] = count * self.image_bucket(max(sizes))
    if Kind.TEXT in room:
      # Text has no more places than images leave in the prompt that has least.
      # Counted in images, of which there are few numbers: those that are cut
      # leave another number of tokens for every size.
      visual = real & (np.asarray(packed.kind) == Kind.VISUAL)
      least = int(visual.sum(axis=1).min()) // count
      least = max([n for n in (0, *self.image_buckets) if n <= least])
      rest = tokens.shape[1] - least * count
      room[Kind.TEXT] = min(room[Kind.TEXT], rest)
    return packed, tuple(room.items())

  def image_bucket(self, images: int) -> int:
    """The number of images or crops that so many are padded to."""
    return min([n for n in self.image_buckets if n >= images], default=images)

  def prefill(
    self,
    prompts: Sequence[Ids],
    images: Sequence[Images] | None = None,
    key: PRNGKeyArray | None = None,
  ) -> Generation:
    """Takes prompts; see `pack` for errors.

    Args:
      prompts: ids of each, with one placeholder for each image.
      images: of each prompt, in the order of its placeholders, as the
        preprocessing makes them: `[height, width, c]`, `Crops` or `Patches`, or
        a `Clip` of these; None: there are none.
      key: for recipes that are random.
    """
    images = [()] * len(prompts) if images is None else images
    return self.prefill_packed(*self.pack(prompts, images), key)

  def prefill_packed(
    self, packed: Prompts, room: Capacities, key: PRNGKeyArray | None = None
  ) -> Generation:
    """`prefill` of what `pack` returned."""
    run = prefill_whole if self.language.one_program else prefill
    return run(
      self.model, self.params, packed, self.decode, self.chunk, room, key
    )

  def stream(self, going: Generation, **options: Any) -> Iterator[np.ndarray]:
    """Tokens `[b]`, step by step; see `Generator.stream`."""
    return self.language.stream(going, **options)

  def step(self, going: Generation, token: np.ndarray) -> Generation:
    """Takes one token of each text; `going` is used up."""
    return self.language.step(going, token)

  def generate(
    self,
    prompts: Sequence[Ids],
    images: Sequence[Images] | None = None,
    *,
    image_key: PRNGKeyArray | None = None,
    **options: Any,
  ) -> list[list[int]]:
    """The tokens after each prompt.

    Args:
      prompts, images: see `prefill`.
      image_key: for recipes that are random.
      **options: of `stream`.
    """
    going = self.prefill(prompts, images, image_key)
    return generation.texts_of(self.stream(going, **options), len(prompts))

  def bytes(self, going: Generation) -> Bytes:
    """Sizes of the cache of all blocks."""
    return self.language.bytes(going)
