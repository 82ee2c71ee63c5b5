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
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokjax import signals
from tokjax.attention.padding import RealFirst
from tokjax.models import vlm_fused, vlm_places, vlm_seen
from tokjax.models.decoder import Decoder
from tokjax.models.decoder_block import Rows, positions_of
from tokjax.models.native_patches import NativeResolutionConfig, Patches
from tokjax.models.projector import Projector
from tokjax.models.vit import ViT, ViTConfig
from tokjax.models.vlm_ahead import Ahead
from tokjax.models.vlm_config import VisionLanguageConfig
from tokjax.models.vlm_slots import (
  check_slots,
  language_slots,
  merged_tower,
  passes_class,
  tokens_per_image,
  vision_tower,
  without_class,
)
from tokjax.signals import Answers, Merged, Seen
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens

__all__ = [
  "Mix", "Placed", "Prompts", "VisionLanguage", "VisionLanguageConfig",
  "check_slots", "language_slots", "passes_class", "tokens_per_image",
  "vision_tower", "without_class",
]  # fmt: skip


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
    origin: where visual tokens come from, see `tokjax.signals.Origins`, `[b, n,
      8]`; None: unknown.
    start: where positions have three axes, the position of a TEXT token on all
      of them, and of VISUAL ones that of the first of their image, `[b, n]`.
    time: then also how much later VISUAL tokens are on the first axis, those of
      a clip, `[b, n]`; None: not at all.
    following: then also the position of the token after each prompt, `[b]`.
    mix: of what VISUAL tokens are means; None: each is one row.
    recalled: what earlier prompts said of VISUAL tokens, `[b, n]`; None: there
      are none. See `tokjax.models.control`.
  """

  tokens: Int[Array, "b n"]
  kind: Int[Array, "b n"]
  place: Int[Array, "b n"]
  length: Int[Array, "b"]
  images: Float[Array, "k height width c"] | Patches | None = None
  origin: Int[Array, "b n 8"] | None = None
  start: Int[Array, "b n"] | None = None
  following: Int[Array, "b"] | None = None
  time: Int[Array, "b n"] | None = None
  mix: "Mix | None" = None
  recalled: Float[Array, "b n"] | None = None

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
    if cfg.fused is not None:
      self.fused = ViT(cfg.fused, dtype=self.dtype)
    if cfg.merge > 1:
      self.merged = merged_tower(cfg, self.slots)
    self.projector = Projector(cfg.projector, of("projector"), self.dtype)
    self.language = self.decoder
    if cfg.pinpoints:
      init = nn.initializers.normal(0.02)
      self.newline = self.param("newline", init, (cfg.language.width,))

  @property
  def decoder(self) -> Decoder:
    """The language model; its parameters are `params["language"]`."""
    slots = language_slots(self.config, self.slots)
    return Decoder(
      self.config.language, slots, self.dtype, images=True, parent=None
    )

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
      coordinates=placed.coordinates, known=self._known(prompts, placed.seen),
      key=_part(key, 2), train=train,
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
    cfg, beside = self.config.vision, None
    if self.config.fused is not None:
      assert not isinstance(images, Patches)
      images, beside = jnp.split(images, [cfg.channels], axis=-1)
    _, out = self.vision(images, key=_part(key, 0), train=train)
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
    plans = [plan for block in out["plans"] for plan in block]
    if self.config.ahead:
      grid = grid_of(tokens, front)
      tokens, more = self.ahead(tokens, grid=grid, key=_part(key, 3))
      plans += more
    if not passes_class(self.config, self.slots):
      tokens = jax.tree.map(lambda x: x[:, front:], tokens)
      front = 0
    if beside is not None:
      x = self.fused(beside)[1]["tokens"].x[:, len(self.config.fused.kinds) :]
      x = vlm_fused.follow(x, len(cfg.kinds), plans)
      tokens = vlm_fused.join(tokens, x)
    if (merge := self.config.merge) > 1:
      tokens = vlm_places.merged(tokens, (rows, columns), merge)
      tokens = self.merged(tokens, out["signals"], _part(key, 3))
      rows, columns = rows // merge, columns // merge
    tokens = self.projector(
      tokens, front=front, grid=grid_of(tokens, front), key=_part(key, 1)
    )
    return tokens, out

  def enter(self, prompts: Prompts, key: PRNGKeyArray | None = None) -> Rows:
    """Prompts as they enter the language model, padding at their end."""
    placed = self._placed(prompts, key)
    known = self._known(prompts, placed.seen)
    found = (
      prompts.tokens, prompts.kind, prompts.valid & placed.real, placed.inputs,
      placed.coordinates, known,
    )  # fmt: skip
    if placed.inputs is not None:
      # Visual tokens that are padding move behind the text.
      found = jax.tree.map(RealFirst.of(found[2]).apply, found)
    token, kind, valid, inputs, coordinates, known = found
    rows = self.language.enter(
      token, positions_of(valid), valid, kind, inputs, coordinates
    )
    return rows._replace(known=known)

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
      if prompts.start is None:
        raise ValueError("prompts: have patches, and no start= of positions")
      coordinates = vlm_places.coordinates(
        prompts.start, prompts.kind, prompts.place, tokens, prompts.time
      )
    return Placed(inputs, real, out, coordinates)

  def _known(self, prompts: Prompts, seen: dict[str, Any] | None) -> Answers:
    """What rules in the language model are told about images.

    Args:
      prompts: texts with images.
      seen: what the encoder returned; None: there are no images.
    """
    if seen is None:
      return vlm_seen.without_images(self.slots, prompts.tokens.shape)
    cfg, known = self.config.vision, Answers()
    for question in vlm_seen.asked(self.slots):
      if isinstance(question, signals.Recalled):
        if prompts.recalled is not None:
          known = known.add(question, prompts.recalled)
        continue
      if isinstance(question, Merged):
        known = known.add(question, self._merged(prompts, seen))
        continue
      if not isinstance(question, Seen):
        if prompts.origin is None:
          raise ValueError(
            f"prompts: recipe {self.slots.name!r} asks where visual tokens come"
            " from; give origin=, as VisionLanguageGenerator.pack does"
          )
        known = known.add(question, prompts.origin)
        continue
      if question.ahead:
        value = self.ahead.answer(seen["tokens"], question.question)
      else:
        own = vlm_seen.of_tower(question.question, cfg.depth)
        value = seen["signals"][own.layer.index][own]
      value = vlm_seen.of_patches(question, value, len(cfg.kinds))
      value = vlm_seen.spread(value, prompts.kind, prompts.place)
      known = known.add(question, value)
    return known

  def _merged(self, prompts: Prompts, seen: dict[str, Any]) -> Array:
    """The answer to `Merged`."""
    images, n = seen["tokens"].x.shape[:2]
    passed = passes_class(self.config, self.slots)
    front = 0 if passed else len(self.config.vision.kinds)
    plans = [plan for block in seen["plans"] for plan in block]
    value = vlm_seen.merged(plans, front, images, n)
    return vlm_seen.spread(value, prompts.kind, prompts.place, -1)


def _part(key: PRNGKeyArray | None, i: int) -> PRNGKeyArray | None:
  return None if key is None else jax.random.fold_in(key, i)
