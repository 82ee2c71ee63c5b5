"""Vision transformers: ViT, DeiT, CLIP and SigLIP towers, MAE-style pooling.

One encoder with two slots (`reduce`, `attend`); families differ by
configuration only. `ViT(config, slots).apply({"params": p}, images)` returns
`(logits or features, out)`, where `out` holds tokens, plans and pooled
features; jit prunes what is not used. Parameter names follow the layers
(`block_3/attention/query/kernel`); `tokjax.interop` maps published
checkpoints onto them.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from tokjax.models import faults
from tokjax.models.activations import ACTIVATIONS
from tokjax.models.embed import Embed
from tokjax.models.encoder import Encoder
from tokjax.models.head import Head
from tokjax.models.positions import RESIZES
from tokjax.models.reducer import sequence_of_patches
from tokjax.reduce.stages import Stages, plan_stages
from tokjax.signals import By, unanswered
from tokjax.slots import Slots, for_encoder
from tokjax.tokens import Kind

CARRIES = (
  "reduce",
  "attend",
  "program",
  "proportional",
  "pool_by_size",
  "collect",
  "adapter_rank",
)

CHOICES = {
  "stem": ("patch", "conv"),
  "pool": ("class", "mean", "map", "none"),
  "head_norm": ("tokens", "pooled", "none"),
  "activation": tuple(ACTIVATIONS),
  "position_resize": RESIZES,
}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """Architecture of a vision transformer; the defaults are ViT-B/16.

  Attributes:
    image_size: in pixels; height and width where they differ.
    patch_size: side of a patch; with `stem="conv"` the total stride.
    drop_edge: image_size needs not be a multiple of patch_size: what lies
      beyond whole patches, right and below, is left out (SigLIP at 384 / 14).
    channels: of an image.
    width, depth, heads, mlp_dim: features of a token, blocks, heads of a block,
      features inside its MLP.
    stem: "patch" is one strided convolution; "conv" two 3x3 convolutions
      before it, for small images.
    class_token, distillation_token, registers: tokens put in front.
    pool: what the head sees: "class", "mean" of the patches, "map" (SigLIP's
      attention pooling) or "none" (all tokens).
    head_norm: "tokens": the final norm acts before pooling, "pooled": after
      it (CLIP, MAE fine-tuning); "none": there is none (InternVL).
    pre_norm: LayerNorm on the embedded tokens (CLIP).
    patch_bias, qkv_bias: the patch embedding, and queries, keys and values have
      a bias.
    pooler: width of a dense layer with tanh on the pooled features (the head
      of ViT checkpoints without classes).
    projection: width of a bias-free projection of the pooled features (CLIP).
    num_classes: None: no head.
    distillation_head: where there is a distillation token, a second classifier
      reads it and the logits are the mean of both.
    position_on_class: the position table has rows for class and distillation
      token.
    position_on_registers: it also has rows for registers.
    position_resize: how the position table is interpolated for images of
      another size; one of `positions.RESIZES`.
    activation: of the MLP.
    epsilon: of the norms.
    layer_scale: learned factor on each residual branch (DeiT-III, DINOv2).
  """

  image_size: int | tuple[int, int] = 224
  patch_size: int = 16
  channels: int = 3
  width: int = 768
  depth: int = 12
  heads: int = 12
  mlp_dim: int = 3072
  stem: Literal["patch", "conv"] = "patch"
  class_token: bool = True
  distillation_token: bool = False
  registers: int = 0
  pool: Literal["class", "mean", "map", "none"] = "class"
  head_norm: Literal["tokens", "pooled", "none"] = "tokens"
  pre_norm: bool = False
  patch_bias: bool = True
  qkv_bias: bool = True
  position_on_class: bool = True
  position_on_registers: bool = False
  pooler: int | None = None
  projection: int | None = None
  num_classes: int | None = 1000
  distillation_head: bool = True
  activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
  epsilon: float = 1e-6
  layer_scale: bool = False
  position_resize: Literal[
    "bicubic", "bicubic_antialias", "bilinear_antialias"
  ] = "bicubic"
  drop_edge: bool = False

  def __post_init__(self):
    size = self.image_size
    if isinstance(size, list | tuple) and len(size) == 2:
      # Equal configurations compare as equal, also if read from a list.
      size = size[0] if size[0] == size[1] else tuple(size)
      object.__setattr__(self, "image_size", size)
    faults.check(self._fields())
    faults.check(self._relations())

  def _fields(self) -> Iterator[str]:
    """Faults of single fields."""
    sizes = ("patch_size", "channels", "width", "heads", "mlp_dim")
    yield from faults.integers(self, sizes, 1)
    if not all(faults.is_integer(x) and x > 0 for x in self.image_sides):
      yield (
        f"image_size={self.image_size!r}: must be 1 or more, or two of these"
        " (height, width), as integers"
      )
    # Without blocks it is a linear model of its patches.
    yield from faults.integers(self, ("registers", "depth"), 0)
    heads = ("pooler", "projection", "num_classes")
    given = [name for name in heads if getattr(self, name) is not None]
    yield from faults.integers(self, given, 1)
    yield from faults.positives(self, ("epsilon",))
    if self.epsilon is None:
      yield "epsilon=None: must be a finite number above 0"
    for name, allowed in CHOICES.items():
      if getattr(self, name) not in allowed:
        yield f"{name}={getattr(self, name)!r}: must be one of {allowed}"

  def _relations(self) -> Iterator[str]:
    """Faults between fields that are each allowed."""
    over = any(side % self.patch_size for side in self.image_sides)
    if over and not self.drop_edge:
      yield (
        f"image_size={self.image_size}: must be a multiple of"
        f" patch_size={self.patch_size}"
      )
    if self.width % self.heads:
      yield f"width={self.width}: must be a multiple of heads={self.heads}"
    if self.pool == "class" and not self.class_token:
      yield "pool='class': the model has no class token"
    if self.num_classes is not None and self.pool == "none":
      yield "pool='none': classes need pooled features"
    if self.distilled and (self.pool, self.head_norm) != ("class", "tokens"):
      yield "distillation_head=True: needs pool='class' and head_norm='tokens'"
    before = self.class_token or self.distillation_token
    if self.position_on_registers and before and not self.position_on_class:
      yield "position_on_registers=True: needs position_on_class=True"

  @property
  def image_sides(self) -> tuple[int, int]:
    """Height and width in pixels."""
    size = self.image_size
    if isinstance(size, tuple) and len(size) == 2:
      return size
    return size, size

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches."""
    height, width = self.image_sides
    return height // self.patch_size, width // self.patch_size

  @property
  def num_patches(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def kinds(self) -> tuple[Kind, ...]:
    """Kinds of the tokens in front of the patches."""
    return (
      (Kind.CLASS,) * self.class_token
      + (Kind.DISTILLATION,) * self.distillation_token
      + (Kind.REGISTER,) * self.registers
    )

  @property
  def positions_in_front(self) -> int:
    """Rows of the position table before those of the patches."""
    first = int(self.class_token) + int(self.distillation_token)
    return first * self.position_on_class + (
      self.registers * self.position_on_registers
    )

  @property
  def distilled(self) -> bool:
    """True if a second classifier reads the distillation token."""
    return (
      self.distillation_token
      and self.distillation_head
      and self.num_classes is not None
    )


class ViT(nn.Module):
  """A vision transformer built with slots.

  Attributes:
    config: the architecture.
    slots: what a recipe returned; `Slots()` is the plain model.
    dtype: of activations; parameters stay float32.
  """

  config: ViTConfig
  slots: Slots = Slots()
  dtype: Any = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    check_slots(self.config, self.slots)

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "b height width c"],
    *,
    mask: Bool[Array, "b n"] | None = None,
    key: PRNGKeyArray | None = None,
    train: bool = False,
    memory: dict[tuple[int, int], Array] | None = None,
  ) -> tuple[Array, dict[str, Any]]:
    """Classifies or encodes images.

    Args:
      images: normalised as the checkpoint expects; another size than the
        configured one interpolates the position table.
      mask: patches that are real (row major); None: all.
      key: for recipes that are random, one key for the batch.
      train: recipes that train with soft masks use that form.
      memory: `out["memory"]` of an earlier call, for recipes that fill what
        they drop from it; None: every token is computed, which makes it.

    Returns:
      logits `[b, num_classes]` (without classes the pooled features, through
      pooler and projection where there are any), and `out`: "tokens" (after
      the encoder), "plans" (one or None for each block), "features" (what is
      pooled, `[b, m, d]`: the tokens, normed if `head_norm` says so),
      "pooled" (before pooler and projection), and with a distillation head
      "class_logits" and "distillation_logits".
    """
    if self.slots.program is None:
      return self._forward(images, mask, key, train, memory)
    if mask is not None:
      raise ValueError(
        f"recipe {self.slots.name!r} changes the image; it cannot take a mask"
      )
    forward = lambda images: self._forward(images, None, key, train, memory)
    return self.slots.program(forward, images, self.config.patch_size)

  def _forward(self, images, mask, key, train, memory):
    cfg = self.config
    tokens, grid = Embed(cfg, self.dtype, name="embed")(images, mask)
    encoder = Encoder(cfg, self.slots, self.dtype, name="encoder")
    tokens, trace = encoder(
      tokens, grid=grid, key=key, train=train, memory=memory
    )
    head = Head(cfg, self.slots.pool_by_size, self.dtype, name="head")
    logits, out = head(tokens)
    return logits, {"tokens": tokens, **trace, **out}


def check_slots(config: ViTConfig, slots: Slots) -> None:
  """Raises ValueError for slots that a model cannot carry out.

  Args:
    config: of the model.
    slots: what a recipe returned.
  """
  slots.refuse_foreign(CARRIES, "a vision encoder")
  if slots.attend is not None and not for_encoder(slots.attend):
    raise ValueError(
      f"recipe {slots.name!r} fills 'attend' with"
      f" {type(slots.attend).__name__}, which is causal attention of decoders;"
      " a vision encoder takes tokjax.attention.BlockSparse and the modules of"
      " tokjax.learned"
    )
  if slots.pool_by_size and config.pool not in ("mean", "map"):
    raise ValueError(
      f"recipe {slots.name!r} fills 'pool_by_size', which a model with"
      f" pool={config.pool!r} does not carry out; it is for pool='mean' or"
      " 'map'"
    )
  for reduce in slots.reduce:
    if reduce.again or reduce.unmerged or reduce.position != "keep":
      raise ValueError(
        f"recipe {slots.name!r}, slot 'reduce': again=, unmerged= and"
        " renumbering are for"
        " language models; a vision encoder keeps positions"
      )
    if Kind.PATCH not in reduce.free.kinds:
      raise ValueError(
        f"recipe {slots.name!r}, slot 'reduce': reduces"
        f" {[k.name for k in reduce.free.kinds]};"
        " a vision encoder has free tokens of the kind PATCH"
      )
  kinds = (*config.kinds, Kind.PATCH)
  for question in (*(q for r in slots.reduce for q in r.asks), *slots.collect):
    of = getattr(question, "of", None)
    if isinstance(of, By):
      raise ValueError(
        f"recipe {slots.name!r}, slot 'reduce': weights queries by a signal,"
        " which only decoders answer"
      )
    if asked := unanswered(question, kinds):
      raise ValueError(
        f"recipe {slots.name!r}, slot 'reduce': asks for the attention of"
        f" {asked} tokens, which this model does not have"
        f" (class_token={config.class_token}); it has"
        f" {sorted({kind.name for kind in kinds})}"
      )
  if len(slots.reduce) == 1:
    # A budget that runs out is refused, also where all tokens come back.
    slots.counts(config.num_patches, config.depth)
  stages = plan_stages(
    slots.reduce,
    sequence_of_patches(config.num_patches, len(config.kinds), config.grid),
    config.depth,
    recipe=slots.name,
  )
  if slots.attend is not None:
    check_attend(slots, stages)
  if getattr(slots.attend, "gridded", False):
    check_grid(slots, stages)


def check_attend(slots: Slots, stages: Stages) -> None:
  """Raises where a reduction inside attention does without the attend slot."""
  square = getattr(slots.attend, "square", False)
  for stage in (s for block in stages for s in block):
    reduce, attend = stage.reduce, type(slots.attend).__name__
    if reduce.at == "attention" and not reduce.around:
      raise ValueError(
        f"recipe {slots.name!r}: {reduce.recipe or 'a reduction'} moves the"
        f" dense attention map itself, so that {attend} would have no effect in"
        f" block {stage.layer}; use one of the two"
      )
    if reduce.at == "queries" and square:
      raise ValueError(
        f"recipe {slots.name!r}: {reduce.recipe or 'a reduction'} leaves fewer"
        f" queries than keys in block {stage.layer}, and {attend} needs as many"
        " of both; use one of the two"
      )


def check_grid(slots: Slots, stages: Stages) -> None:
  """Raises where attention that pools on the grid meets fewer tokens.

  Only what acts behind the attention of the last block leaves it the grid.
  """
  for stage in (s for block in stages for s in block):
    last = stage.layer == stage.depth - 1
    if not (last and stage.reduce.at in ("mlp", "output")):
      raise ValueError(
        f"recipe {slots.name!r}: {type(slots.attend).__name__} attends on the"
        f" complete grid in every block, and {stage.reduce.recipe or 'another'}"
        f" reduces it in block {stage.layer}; use one of the two"
      )
