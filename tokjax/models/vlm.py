"""Vision-language models: a vision encoder, a projector, a language model.

Each of the three is a tower with slots of its own,

    slots = recipes.compose("visionzip", "fastv", "snapkv")
    model = VisionLanguage(config, slots)

where `slots.towers` fills "vision", "ahead" (the block of the encoder behind
its features) and "projector", and the other fields fill the language model.
Reductions in towers leave fewer visual tokens, and prompts become shorter by as
many. `tokjax.models.vlm_prompts` lays prompts out,
`tokjax.models.vlm_generation` answers them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokjax.attention.padding import RealFirst
from tokjax.models import faults, vlm_places, vlm_tower
from tokjax.models.decoder import Decoder, Rows, positions_of
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.native_resolution import (
  USUAL,
  NativeResolution,
  NativeResolutionConfig,
  Patches,
)
from tokjax.models.projector import Projector, ProjectorConfig
from tokjax.models.vit import ViT, ViTConfig
from tokjax.models.vlm_ahead import Ahead
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens

# In the order in which they act.
TOWERS = ("vision", "ahead", "projector")


@dataclasses.dataclass(frozen=True)
class VisionLanguageConfig:
  """Architecture of a vision-language model in the manner of LLaVA.

  Attributes:
    vision: of the encoder. Its blocks end where the features leave: 23 for
      `hidden_states[-2]` of 24. One of native resolution takes `Patches`, its
      language model has positions of three axes.
    projector: of the projector; its width is that of the language model.
    language: of the decoder.
    image_token: the id that stands for an image in a prompt.
    pass_class: the class token of the encoder goes on to the language model.
    ahead: there is one more block behind the features, which rules can ask.
    pinpoints: heights and widths that images are brought to and cut into crops
      from, see `tokjax.models.any_resolution`; (): an image is seen once.
    most_crops: with pinpoints: crops may have as many tokens as this number of
      them, more are brought down, and images may come as a single crop, which a
      newline ends (LLaVA-OneVision); None: neither.
    tiled: without pinpoints: an image is any number of crops, whose tokens
      stand one after the other.
    merge: patches on a side of the block that becomes one visual token (pixel
      shuffle); an encoder of native resolution has its own.
  """

  vision: ViTConfig | NativeResolutionConfig
  projector: ProjectorConfig
  language: DecoderConfig
  image_token: int
  pass_class: bool = False
  ahead: bool = False
  pinpoints: tuple[tuple[int, int], ...] = ()
  most_crops: int | None = None
  tiled: bool = False
  merge: int = 1

  def __post_init__(self):
    points = tuple((height, width) for height, width in self.pinpoints)
    object.__setattr__(self, "pinpoints", points)
    if isinstance(self.vision, NativeResolutionConfig):
      self._check_native(self.vision)
    else:
      self._check_pinpoints(self.vision)
      self._check_merge(self.vision)
    if self.projector.width != self.language.width:
      raise ValueError(
        f"projector: has width {self.projector.width}; must be that of the"
        f" language model, {self.language.width}"
      )
    if not 0 <= self.image_token < self.language.vocabulary:
      raise ValueError(
        f"image_token={self.image_token}: must be an id of the vocabulary of"
        f" {self.language.vocabulary}"
      )
    if self.pass_class and not self.vision.kinds:
      raise ValueError("pass_class=True: the encoder has no class token")

  def _check_pinpoints(self, vision: ViTConfig) -> None:
    sides = vision.image_sides
    if self.pinpoints and sides[0] != sides[1]:
      raise ValueError(f"pinpoints: crops must be square, not {sides}")
    wrong = [p for p in self.pinpoints if any(n % sides[0] or n < 1 for n in p)]
    if wrong:
      raise ValueError(
        f"pinpoints={wrong}: must be multiples of {sides[0]}, the encoder's"
        " image_size"
      )

  def _check_merge(self, vision: ViTConfig) -> None:
    faults.check(faults.integers(self, ("merge",), 1))
    if any(side % self.merge for side in vision.grid):
      raise ValueError(
        f"merge={self.merge}: must divide the sides of the grid of patches,"
        f" {vision.grid}"
      )
    if self.merge > 1 and (self.pinpoints or self.pass_class or self.ahead):
      raise ValueError(
        f"merge={self.merge}: does not go together with pinpoints, pass_class"
        " and ahead"
      )
    if self.most_crops is not None:
      faults.check(faults.integers(self, ("most_crops",), 1))
      if not self.pinpoints:
        raise ValueError("most_crops: is for crops of pinpoints; give these")
    if self.tiled and self.pinpoints:
      raise ValueError("tiled: crops are those of pinpoints; give one of both")

  def _check_native(self, vision: NativeResolutionConfig) -> None:
    if self.pinpoints or self.ahead or self.tiled or self.merge != 1:
      raise ValueError(
        "pinpoints, ahead, tiled, merge: are for encoders of one size of image,"
        " and this one takes images at their own"
      )
    if self.language.axes != 3:
      raise ValueError(
        f"language: has positions of {self.language.axes} axes; a vision tower"
        " of native resolution needs three: Rotary(sections=...)"
      )
    if self.projector.parts != vision.merged:
      raise ValueError(
        f"projector: has parts={self.projector.parts}; must be the patches that"
        f" are merged, {vision.merged}"
      )

  @property
  def depth(self) -> int:
    """Blocks of all towers."""
    return self.vision.depth + self.language.depth


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
  """Padded prompts in which every placeholder is one visual token.

  Attributes:
    tokens: ids, padding at the end, `[b, n]`.
    kind: of each token, TEXT, VISUAL or NEWLINE, `[b, n]`.
    place: of a VISUAL token, its row among the visual tokens of all images one
      after the other, `[b, n]`.
    length: real tokens of each prompt, `[b]`.
    images: pixels of the images of all prompts, or of their crops, `[k, height,
      width, c]`; or patches; None: no prompt has any.
    origin: where positions have three axes, the position of a TEXT token on
      all of them, and of VISUAL ones that of the first of their image,
      `[b, n]`.
    following: then also the position of the token after each prompt, `[b]`.
    mix: of what VISUAL tokens are means; None: each is one row.
  """

  tokens: Int[Array, "b n"]
  kind: Int[Array, "b n"]
  place: Int[Array, "b n"]
  length: Int[Array, "b"]
  images: Float[Array, "k height width c"] | Patches | None = None
  origin: Int[Array, "b n"] | None = None
  following: Int[Array, "b"] | None = None
  mix: "Mix | None" = None

  @property
  def valid(self) -> Bool[Array, "b n"]:
    return jnp.arange(self.tokens.shape[1])[None] < self.length[:, None]


class Mix(NamedTuple):
  """Visual tokens that are weighted means of several.

  Attributes:
    place: rows as in `Prompts`, `[b, n, t]`.
    weight: of each, `[b, n, t]`.
  """

  place: Int[Array, "b n t"]
  weight: Float[Array, "b n t"]


class Placed(NamedTuple):
  """Visual tokens at their places in prompts.

  Attributes:
    inputs: their embeddings, `[b, n, d]`; None: there are no images.
    real: False for visual tokens that are padding, `[b, n]`.
    seen: what the encoder returned.
    coordinates: positions of all tokens on each axis, `[b, n, a]`; None: there
      is one axis.
  """

  inputs: Float[Array, "b n d"] | None
  real: Bool[Array, "b n"]
  seen: dict[str, Any] | None = None
  coordinates: Int[Array, "b n a"] | None = None


class VisionLanguage(nn.Module):
  """A vision-language model built with slots.

  Attributes:
    config: the architecture.
    slots: what recipes returned; `Slots()` is the plain model.
    dtype: of activations and caches; parameters stay float32.
  """

  config: VisionLanguageConfig
  slots: Slots = Slots()
  dtype: Any = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    check_slots(self.config, self.slots)

  def setup(self):
    cfg = self.config
    self.vision = vision_tower(cfg, self.slots, self.dtype)
    of = self.slots.tower
    if cfg.ahead:
      assert isinstance(cfg.vision, ViTConfig)
      self.ahead = Ahead(cfg.vision, without_class(of("ahead")), self.dtype)
    self.projector = Projector(cfg.projector, of("projector"), self.dtype)
    self.language = self.decoder
    if cfg.pinpoints:
      init = nn.initializers.normal(0.02)
      self.newline = self.param("newline", init, (cfg.language.width,))

  @property
  def decoder(self) -> Decoder:
    """The language model; its parameters are `params["language"]`."""
    slots = self.slots.outside_towers
    return Decoder(self.config.language, slots, self.dtype, parent=None)

  def __call__(
    self,
    prompts: Prompts,
    *,
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "b n v"], dict[str, Any]]:
    """Logits of the token after each one, of whole sequences.

    Args:
      prompts: texts with images.
      key: for recipes that are random.
      train: recipes that train with soft masks use that form.

    Returns:
      What `Decoder` returns; `out` also holds "vision", what the encoder
      returned (None without images).
    """
    placed = self._placed(prompts, key, train)
    mask = prompts.valid & placed.real
    logits, out = self.language(
      prompts.tokens, mask=mask, kind=prompts.kind, inputs=placed.inputs,
      coordinates=placed.coordinates, key=_part(key, 2), train=train,
    )  # fmt: skip
    return logits, {**out, "vision": placed.seen}

  def see(
    self,
    images: Float[Array, "k height width c"] | Patches,
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> tuple[Tokens, dict[str, Any]]:
    """Visual tokens as the language model takes them, `[k, m, d]`.

    Also what the encoder returned. m follows from the configuration and the
    slots alone; a mask says which are real where a recipe adapts to the image.
    Of `Patches` m also follows from their padding, and the real ones come
    first.
    """
    _, out = self.vision(images, key=_part(key, 0), train=train)
    cfg = self.config.vision
    if isinstance(cfg, NativeResolutionConfig):
      tokens = self.projector(out["tokens"], key=_part(key, 1), idle=True)
      order = RealFirst.of(tokens.mask)
      return jax.tree.map(order.apply, tokens), out
    assert not isinstance(images, Patches)
    tokens, front = out["tokens"], len(cfg.kinds)
    rows, columns = (side // cfg.patch_size for side in images.shape[1:3])
    grid_of = lambda tokens, front: (
      (rows, columns) if tokens.num_tokens - front == rows * columns else None
    )
    if self.config.ahead:
      grid = grid_of(tokens, front)
      tokens = self.ahead(tokens, grid=grid, key=_part(key, 3))
    if not passes_class(self.config, self.slots):
      tokens = jax.tree.map(lambda x: x[:, front:], tokens)
      front = 0
    if (merge := self.config.merge) > 1:
      tokens = vlm_places.merged(tokens, (rows, columns), merge)
      rows, columns = rows // merge, columns // merge
    tokens = self.projector(
      tokens, front=front, grid=grid_of(tokens, front), key=_part(key, 1)
    )
    return tokens, out

  def enter(
    self, prompts: Prompts, key: PRNGKeyArray | None = None
  ) -> Rows:
    """Prompts as they enter the language model, padding at their end."""
    placed = self._placed(prompts, key)
    found = (
      prompts.tokens, prompts.kind, prompts.valid & placed.real, placed.inputs,
      placed.coordinates,
    )  # fmt: skip
    if placed.inputs is not None:
      # Visual tokens that are padding move behind the text.
      found = jax.tree.map(RealFirst.of(found[2]).apply, found)
    token, kind, valid, inputs, coordinates = found
    return self.language.enter(
      token, positions_of(valid), valid, kind, inputs, coordinates
    )

  def _placed(self, prompts: Prompts, key, train: bool = False) -> Placed:
    """Visual tokens at their places in prompts."""
    if self.is_initializing() and prompts.images is None:
      raise ValueError("prompts: parameters are made from prompts with images")
    if prompts.images is None:
      return Placed(None, jnp.ones(prompts.tokens.shape, bool))
    tokens, out = self.see(prompts.images, key, train)
    flat = tokens.x.reshape(-1, tokens.x.shape[-1])
    real = jnp.ones(prompts.tokens.shape, bool)
    if tokens.mask is not None:
      visual = prompts.kind == Kind.VISUAL
      real = ~visual | tokens.mask.reshape(-1)[prompts.place]
    inputs = flat[prompts.place]
    if prompts.mix is not None:
      place, weight = prompts.mix
      weight = weight.astype(flat.dtype)
      inputs = jnp.einsum("bnt,bntd->bnd", weight, flat[place])
    if self.config.pinpoints:
      newline = (prompts.kind == Kind.NEWLINE)[..., None]
      inputs = jnp.where(newline, self.newline.astype(inputs.dtype), inputs)
    coordinates = None
    if isinstance(prompts.images, Patches):
      if prompts.origin is None:
        raise ValueError("prompts: have patches, and no origin of positions")
      coordinates = vlm_places.coordinates(
        prompts.origin, prompts.kind, prompts.place, tokens
      )
    return Placed(inputs, real, out, coordinates)


def _part(key: PRNGKeyArray | None, i: int) -> PRNGKeyArray | None:
  return None if key is None else jax.random.fold_in(key, i)


def passes_class(config: VisionLanguageConfig, slots: Slots) -> bool:
  """Whether the class token goes on to the language model."""
  inside = (slots.tower(name).pass_class for name in ("vision", "ahead"))
  return config.pass_class or any(inside)


def without_class(slots: Slots) -> Slots:
  """The slots for a tower; the model itself carries out `pass_class`."""
  return dataclasses.replace(slots, pass_class=False)


def vision_tower(
  config: VisionLanguageConfig, slots: Slots, dtype: Any = jnp.float32
) -> ViT | NativeResolution:
  """The encoder with its slots."""
  own = without_class(slots.tower("vision"))
  if isinstance(config.vision, NativeResolutionConfig):
    return NativeResolution(config.vision, own, dtype, parent=None)
  return ViT(config.vision, own, dtype, parent=None)


def check_slots(config: VisionLanguageConfig, slots: Slots) -> None:
  """Raises ValueError where a tower cannot carry out what it is given.

  The message names the tower, besides recipe, slot and fix.
  """
  known = f"{', '.join(TOWERS)}, and outside of towers the language model"
  for name, own in slots.towers:
    if own.losses:
      raise ValueError(
        f"recipe {slots.name!r}, tower {name!r}: adds losses, which training"
        " takes from outside of towers; use a recipe that needs no training"
      )
    if name not in TOWERS:
      raise ValueError(
        f"recipe {slots.name!r} fills the tower {name!r}, which a"
        f" vision-language model does not have; its towers are {known}"
      )
  if passes_class(config, slots) and config.merge > 1:
    raise ValueError(
      f"recipe {slots.name!r}, tower 'vision': fills 'pass_class', and the"
      f" language model takes {config.merge} x {config.merge} patches, which"
      " the class token is not; use a recipe that does without it"
    )
  if passes_class(config, slots) and not config.vision.kinds:
    raise ValueError(
      f"recipe {slots.name!r}, tower 'vision': fills 'pass_class', and this"
      " encoder has no class token; use a recipe that does without one"
    )
  of = slots.tower
  if of("ahead") != Slots(name=slots.name) and not config.ahead:
    raise ValueError(
      f"recipe {slots.name!r} fills the tower 'ahead', and the features of this"
      " encoder leave behind its last block; use a recipe of the tower 'vision'"
    )
  _in_tower("vision", lambda: vision_tower(config, slots))
  if isinstance(config.vision, ViTConfig):
    ahead, vision = without_class(of("ahead")), config.vision
    _in_tower("ahead", lambda: Ahead(vision, ahead, parent=None))
  _in_tower(
    "projector",
    lambda: Projector(config.projector, of("projector"), parent=None),
  )
  try:
    Decoder(config.language, slots.outside_towers, parent=None)
  except ValueError as error:
    raise ValueError(
      f"tower 'language': {error}. A recipe of another tower is given as"
      f" recipes.get(...).within(tower), one of {', '.join(TOWERS)}"
    ) from error
  if isinstance(config.vision, ViTConfig):
    tokens_per_image(config, slots)
  else:
    own = of("projector")
    _in_tower(
      "projector", lambda: vlm_tower.check_ragged(own, "this model")
    )
    _in_tower("projector", lambda: vlm_tower.stages_of(own, USUAL, 0, None))


def _in_tower(name: str, make: Callable[[], Any]) -> Any:
  """What `make` returns; its refusals name the tower."""
  try:
    return make()
  except ValueError as error:
    raise ValueError(f"tower {name!r}: {error}") from error


@functools.lru_cache(maxsize=256)
def tokens_per_image(config: VisionLanguageConfig, slots: Slots) -> int:
  """Visual tokens of one image, as they enter the language model.

  Nothing is computed: shapes are traced.

  Raises:
    ValueError: the reductions leave nothing for a later one to do, or the
      number depends on the size of the image.
  """
  cfg = config.vision
  if isinstance(cfg, NativeResolutionConfig):
    raise ValueError(
      "image_tokens: depends on the size of an image of native resolution; see"
      " tokjax.models.vlm_native.remaining"
    )
  image = jax.ShapeDtypeStruct((1, *cfg.image_sides, cfg.channels), jnp.float32)
  key = jax.random.key(0)
  tower: Any = vision_tower(config, slots)
  out = jax.eval_shape(
    lambda x: tower.init_with_output(key, x, key=key)[0][1]["tokens"].x, image
  )
  front = len(cfg.kinds)
  patches, all_patches = out.shape[1] - front, cfg.num_patches
  grid = cfg.grid
  if (merge := config.merge) > 1:
    if patches != all_patches:
      raise ValueError(
        f"recipe {slots.name!r}, tower 'vision': leaves {patches} of"
        f" {all_patches} patches, and {merge} x {merge} of them are merged"
        " behind the encoder, for which all must be there; use the recipe"
        " within the projector"
      )
    patches = all_patches = patches // merge**2
    grid = (grid[0] // merge, grid[1] // merge)
  for name in ("ahead", "projector"):
    if name == "projector" and not passes_class(config, slots):
      front = 0
    whole = grid if patches == all_patches else None
    plan = lambda name=name, patches=patches, front=front, whole=whole: (
      vlm_tower.stages_of(slots.tower(name), patches, front, whole)
    )
    for stage in _in_tower(name, plan)[0]:
      patches = stage.outputs - front
  return patches + front
