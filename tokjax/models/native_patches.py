"""Images at their own resolution as patches, and towers that take them."""

import dataclasses
from collections.abc import Iterator
from typing import Generic, Literal, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax.models import faults
from tokjax.models.activations import ACTIVATIONS
from tokjax.tokens import Kind

# Arrays from JAX or NumPy.
Given = Array | np.ndarray
# Merged patches of an image for which slots are checked when a model is built.
USUAL = 1024


@dataclasses.dataclass(frozen=True)
class NativeResolutionConfig:
  """Architecture of the tower; the defaults are those of Qwen2-VL.

  Attributes:
    patch_size: side of a patch in pixels.
    channels: of an image.
    frames: that a patch spans; an image is repeated so often.
    merge: patches on a side of the block that becomes one visual token.
    width, depth, heads, mlp_dim: features of a patch, blocks, heads of a block,
      features inside its MLP.
    norm: "layer", or "rms" without a mean and a bias.
    gated: the MLP is down(activation(gate(x)) * up(x)).
    activation: of the MLP.
    epsilon: of the norms.
    base: of the rotary frequencies, which rows and columns share.
    window: side in patches of the windows that attention is restricted to;
      None: patches see the whole image.
    full: blocks in which they see it although there are windows.
  """

  patch_size: int = 14
  channels: int = 3
  frames: int = 2
  merge: int = 2
  width: int = 1280
  depth: int = 32
  heads: int = 16
  mlp_dim: int = 5120
  norm: Literal["layer", "rms"] = "layer"
  gated: bool = False
  activation: str = "quick_gelu"
  epsilon: float = 1e-6
  base: float = 10_000.0
  window: int | None = None
  full: tuple[int, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, "full", tuple(self.full))
    faults.check(self._fields())
    faults.check(self._relations())

  def _fields(self) -> Iterator[str]:
    """Faults of single fields."""
    sizes = ("patch_size", "channels", "frames", "merge", "width", "depth")
    sizes += ("heads", "mlp_dim")
    sizes += () if self.window is None else ("window",)
    yield from faults.integers(self, sizes, 1)
    yield from faults.positives(self, ("epsilon", "base"))
    if self.norm not in ("layer", "rms"):
      yield f"norm={self.norm!r}: must be 'layer' or 'rms'"
    if self.activation not in ACTIVATIONS:
      yield (
        f"activation={self.activation!r}: must be one of {sorted(ACTIVATIONS)}"
      )

  def _relations(self) -> Iterator[str]:
    """Faults between fields that are each allowed."""
    if self.width % (4 * self.heads):
      yield (
        f"width={self.width}: must be a multiple of {4 * self.heads}: of rows"
        f" and columns, pairs of features in each of heads={self.heads}"
      )
    if self.window is not None and self.window % self.merge:
      yield f"window={self.window}: must be a multiple of merge={self.merge}"
    if not all(faults.is_integer(i) and 0 <= i < self.depth for i in self.full):
      yield f"full={self.full}: must be blocks 0 to {self.depth - 1}"

  @property
  def kinds(self) -> tuple[Kind, ...]:
    """Kinds of the tokens in front of the patches: there are none."""
    return ()

  @property
  def patch_features(self) -> int:
    """Values of a patch."""
    return self.channels * self.frames * self.patch_size**2

  @property
  def merged(self) -> int:
    """Patches that become one visual token."""
    return self.merge**2

  def windowed(self, layer: int) -> bool:
    """Whether a block sees windows only."""
    return self.window is not None and layer not in self.full


class Patches(NamedTuple):
  """An image, or a batch of them, as patches in blocks that are merged.

  Attributes:
    pixels: normalised, in the order (channel, frame, row, column) within a
      patch, `[n, p]` or `[k, n, p]`.
    grid: rows and columns of patches, `[2]` or `[k, 2]`.
    windows: of a batch for a tower with windows, the patches of each, n where
      there is none, `[k, w, s]`.
  """

  pixels: Float[Given, "*k n p"]
  grid: Int[Given, "*k 2"]
  windows: Int[Given, "k w s"] | None = None


Part = TypeVar("Part", bound=Patches | Given)


@dataclasses.dataclass(frozen=True)
class Clip(Generic[Part]):
  """A video, which one placeholder in a prompt stands for.

  Attributes:
    parts: its frames in order, as images of one size; where a patch spans two
      frames, each part is two of them. `Patches`, or `[height, width, c]`
      (LLaVA-OneVision).
    step: how far positions advance in time from one part to the next, rounded
      down: 1 (Qwen2-VL), positions a second times seconds (Qwen2.5-VL).
  """

  parts: tuple[Part, ...]
  step: float = 1.0

  @property
  def times(self) -> list[int]:
    """Of each part, from that of the first one."""
    return [int(i * self.step) for i in range(len(self.parts))]


def cells(
  count: int, grid: Int[Array, "k 2"], merge: int
) -> tuple[Int[Array, "k n 2"], Bool[Array, "k n"]]:
  """Row and column of every patch in block order, and which are real."""
  at = jnp.arange(count)[None]
  block, inside = at // merge**2, at % merge**2
  across = jnp.maximum(grid[:, 1:] // merge, 1)
  row = block // across * merge + inside // merge
  column = block % across * merge + inside % merge
  real = at < (grid[:, :1] * grid[:, 1:])
  place = jnp.stack([row, column], axis=-1)
  return jnp.where(real[..., None], place, 0), real


def windows_of(
  grid: Int[np.ndarray, "2"], merge: int, window: int
) -> np.ndarray:
  """The patches of each window of an image, -1 where there is none, `[w, s]`.

  Windows at the right and lower edge may be smaller.
  """
  rows, columns = map(int, grid)
  at = np.arange(rows * columns).reshape(
    rows // merge, columns // merge, merge, merge
  )
  at = at.transpose(0, 2, 1, 3).reshape(rows, columns)
  at = np.pad(
    at, ((0, -rows % window), (0, -columns % window)), constant_values=-1
  )
  down, across = (side // window for side in at.shape)
  at = at.reshape(down, window, across, window).transpose(0, 2, 1, 3)
  return at.reshape(down * across, window**2)
