"""The architecture of a vision-language model."""

import dataclasses

from tokjax.models import faults
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.native_patches import NativeResolutionConfig
from tokjax.models.projector import ProjectorConfig
from tokjax.models.vit import ViTConfig


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
    fused: a second encoder with as many patches, whose features follow those of
      `vision` in every token (OpenVLA); images have the channels of both. None:
      there is one.
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
  fused: ViTConfig | None = None

  def __post_init__(self):
    points = tuple((height, width) for height, width in self.pinpoints)
    object.__setattr__(self, "pinpoints", points)
    if isinstance(self.vision, NativeResolutionConfig):
      self._check_native(self.vision)
    else:
      self._check_pinpoints(self.vision)
      self._check_merge(self.vision)
      self._check_fused(self.vision)
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

  def _check_fused(self, vision: ViTConfig) -> None:
    if self.fused is None:
      return
    if self.fused.grid != vision.grid:
      raise ValueError(
        f"fused: has a grid of {self.fused.grid} patches; must be that of the"
        f" other encoder, {vision.grid}"
      )
    if self.fused.image_sides != vision.image_sides:
      raise ValueError(
        f"fused: takes images of {self.fused.image_sides} pixels; must be those"
        f" of the other encoder, {vision.image_sides}"
      )
    if self.merge > 1 or self.pass_class:
      raise ValueError(
        "fused: does not go together with merge and pass_class, since the"
        " second encoder has features of single patches only"
      )

  def _check_native(self, vision: NativeResolutionConfig) -> None:
    one_size = self.pinpoints or self.ahead or self.tiled or self.fused
    if one_size or self.merge != 1:
      raise ValueError(
        "pinpoints, ahead, tiled, merge, fused: are for encoders of one size of"
        " image, and this one takes images at their own"
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
  def channels(self) -> int:
    """Of images, those of both encoders."""
    return self.vision.channels + (self.fused.channels if self.fused else 0)

  @property
  def depth(self) -> int:
    """Blocks of all towers."""
    fused = self.fused.depth if self.fused else 0
    return self.vision.depth + fused + self.language.depth
