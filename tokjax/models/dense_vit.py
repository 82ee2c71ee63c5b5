"""Dense prediction: a vision transformer whose patches become a map.

The head needs every patch. A recipe that removes some has to give them back
behind the last block: `recipes.get("tome", keep=0.5, restore=True)`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from tokjax.models import faults
from tokjax.models.vit import ViT, ViTConfig, check_slots
from tokjax.slots import Slots


@dataclasses.dataclass(frozen=True)
class DenseViTConfig:
  """Architecture of a model that predicts a map.

  Attributes:
    backbone: encodes the image; `pool="none"`, without classes.
    widths: features behind each transposed convolution of the head, which
      doubles both sides of the grid of patches.
    outputs: maps.
  """

  backbone: ViTConfig
  widths: tuple[int, ...] = (256, 128, 64)
  outputs: int = 1

  def __post_init__(self):
    object.__setattr__(self, "widths", tuple(self.widths))
    faults.check(self._faults())

  def _faults(self) -> Iterator[str]:
    yield from faults.integers(self, ("outputs",), 1)
    if not all(faults.is_integer(width) and width > 0 for width in self.widths):
      yield f"widths={self.widths!r}: must be integers of 1 or more"
    if self.backbone.pool != "none":
      yield (
        f"backbone.pool={self.backbone.pool!r}: must be 'none', the head reads"
        " every patch"
      )

  @property
  def depth(self) -> int:
    """Blocks of the backbone."""
    return self.backbone.depth


class Upsampler(nn.Module):
  """From a grid of patches to logits on a finer grid.

  Attributes:
    config: the architecture.
    dtype: of the features.
  """

  config: DenseViTConfig
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "b rows columns d"]
  ) -> Float[Array, "b y x o"]:
    """`y = rows * 2 ** len(widths)`."""
    for i, width in enumerate(self.config.widths):
      up = nn.ConvTranspose(
        width, (4, 4), (2, 2), padding="SAME", dtype=self.dtype, name=f"up_{i}"
      )
      x = nn.relu(up(x))
    return nn.Dense(self.config.outputs, dtype=self.dtype, name="out")(x)


class DenseViT(nn.Module):
  """A vision transformer with a dense head, built with slots.

  Attributes:
    config: the architecture.
    slots: what a recipe returned; each of its reductions has to give back
      what it took.
    dtype: of activations; parameters stay float32.
  """

  config: DenseViTConfig
  slots: Slots = Slots()
  dtype: Any = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    check_slots(self.config.backbone, self.slots)
    for reduce in self.slots.reduce:
      if reduce.back is None:
        raise ValueError(
          f"{self.slots.described(reduce)} leaves fewer patches, and a dense"
          " head reads all of them; build the recipe with restore=True"
        )

  @nn.compact
  def __call__(
    self,
    images: Float[Array, "b height width c"],
    *,
    key: PRNGKeyArray | None = None,
    train: bool = False,
    memory: dict[tuple[int, int], Array] | None = None,
  ) -> tuple[Float[Array, "b height width o"], dict[str, Any]]:
    """Maps of the images' size, in [0, 1], and what `ViT` returns next to it.

    Args:
      images: normalised as the checkpoint expects; another size than the
        configured one interpolates the position table.
      key, train, memory: see `ViT`.
    """
    options = dict(key=key, train=train, memory=memory)
    if self.slots.program is None:
      logits, out = self._logits(images, options)
    else:
      logits, out = self.slots.program(
        lambda images: self._logits(images, options),
        images,
        self.config.backbone.patch_size,
      )
    shape = (*images.shape[:3], self.config.outputs)
    logits = jax.image.resize(
      logits.astype(jnp.float32), shape, "linear", antialias=False
    )
    return nn.sigmoid(logits), out

  def _logits(self, images, options):
    """Logits on the head's own grid."""
    backbone = self.config.backbone
    slots = dataclasses.replace(self.slots, program=None)
    vit = ViT(backbone, slots, self.dtype, name="backbone")
    _, out = vit(images, **options)
    rows, columns = (side // backbone.patch_size for side in images.shape[1:3])
    x = out["features"][:, len(backbone.kinds) :]
    x = x.reshape(len(images), rows, columns, backbone.width)
    return Upsampler(self.config, self.dtype, name="head")(x), out
