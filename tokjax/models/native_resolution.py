"""Images at their own resolution: the vision towers of Qwen2-VL and 2.5-VL.

An image is a sequence of patches with a grid of its own; positions turn queries
and keys by row and column. Patches come in square blocks, so that those that
are merged for the language model stand next to each other. Images of a batch
are padded to one number of patches, and an image with padding equals the image
alone.

Reductions act on merged patches, behind the last block: before it a patch that
goes would leave a hole in its block. What rules ask of a block is answered for
each patch, and averaged over those that are merged.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokjax import signals
from tokjax.attention import core, dense
from tokjax.models import faults
from tokjax.models import vlm_tower as tower
from tokjax.models.activations import ACTIVATIONS
from tokjax.models.answers import EncoderAnswers
from tokjax.models.decoder_layers import RMSNorm
from tokjax.models.encoder import Attention, Mlp
from tokjax.models.reducer import Reducer, Reduces
from tokjax.models.rotary import Rotary, turned
from tokjax.reduce.stages import Sequence, Stages, plan_stages
from tokjax.signals import Question
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens

ANSWERS = (
  *signals.OF_TOKENS, signals.Rows, signals.Received, signals.Attention,
  signals.Queries, signals.Keys, signals.Values,
)  # fmt: skip
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


@dataclasses.dataclass
class NativeAnswers(EncoderAnswers):
  """Answers about patches, whose attention is that of rotated projections.

  Attributes:
    plain: queries and keys before the rotation.
  """

  plain: tuple[Array, Array] | None = None

  def answer(self, question: Question) -> Array:
    assert self.plain is not None
    if isinstance(question, signals.Queries):
      return self.plain[0]
    if isinstance(question, signals.Keys) and not question.rotated:
      return self.plain[1]
    return super().answer(question)


class GatedMlp(nn.Module):
  """down(activation(gate(x)) * up(x)), with biases."""

  hidden: int
  activation: str
  dtype: Any

  @nn.compact
  def __call__(self, x):
    dense = lambda size, name: nn.Dense(size, dtype=self.dtype, name=name)
    gate = ACTIVATIONS[self.activation](dense(self.hidden, "gate")(x))
    return dense(x.shape[-1], "down")(gate * dense(self.hidden, "up")(x))


class Block(nn.Module):
  """Norm, attention of rotated queries and keys, norm, MLP.

  Attributes:
    config: the architecture.
    layer: index of this block.
    dtype: of activations.
  """

  config: NativeResolutionConfig
  layer: int
  dtype: Any

  def setup(self):
    cfg = self.config
    if cfg.norm == "rms":
      norm = lambda: RMSNorm(cfg.epsilon, False, self.dtype)
    else:
      norm = lambda: nn.LayerNorm(epsilon=cfg.epsilon, dtype=self.dtype)
    self.norm1, self.norm2 = norm(), norm()
    self.attention = Attention(cfg.width, cfg.heads, True, self.dtype)
    mlp = GatedMlp if cfg.gated else Mlp
    self.mlp = mlp(cfg.mlp_dim, cfg.activation, self.dtype)

  def __call__(
    self, tokens: Tokens, patches: Patches
  ) -> tuple[Tokens, NativeAnswers]:
    """Tokens behind the block, and what answers questions about it."""
    cfg = self.config
    plain_q, plain_k, v = self.attention.project(self.norm1(tokens.x))
    q, k = (self._rotated(x, tokens.position) for x in (plain_q, plain_k))
    windowed = cfg.windowed(self.layer)
    if windowed:
      y = in_windows(q, k, v, patches.windows)
    else:
      y = whole(q, k, v, tokens.mask)
    x = tokens.x + self.attention.output(y)
    after = tokens.replace(x=x + self.mlp(self.norm2(x)))
    where = {"mask": tokens.mask}
    if windowed:
      window = tokens.position.astype(jnp.int32) // cfg.window
      same = window[:, :, None] == window[:, None]
      where["seen"] = same.all(axis=-1)[:, None]
    known = NativeAnswers(
      self.layer, (), tokens, q, k, v, where, plain=(plain_q, plain_k)
    )
    return after, known

  def _rotated(self, x: Float[Array, "k h n f"], position):
    """Half of the pairs turn by the row, half by the column."""
    frequency = Rotary(self.config.base).frequencies(x.shape[-1] // 2)
    angle = position[..., None] * frequency[None, None, None]
    angle = angle.reshape(*angle.shape[:2], -1)
    y = turned(jnp.swapaxes(x, 1, 2), angle)
    return jnp.swapaxes(y, 1, 2).astype(x.dtype)


def whole(q, k, v, mask) -> Float[Array, "k h n f"]:
  """Attention to all real patches, some rows of the map at a time."""

  def rows(at):
    weight = dense.probabilities(q[:, :, at], k, mask=mask)
    return jnp.swapaxes(dense.mix(weight, v, mask), 1, 2)

  return jnp.swapaxes(core.over_rows(rows, q.shape[2]), 1, 2)


def in_windows(q, k, v, windows) -> Float[Array, "k h n f"]:
  """Attention within windows; other pairs are not computed."""
  images, heads, n, features = q.shape
  count, size = windows.shape[1:]
  flat = windows.reshape(images, 1, count * size, 1)
  real = windows.reshape(images * count, size) < n

  def cut(x):
    x = jnp.take_along_axis(x, jnp.minimum(flat, n - 1), axis=2)
    x = x.reshape(images, heads, count, size, features)
    return x.transpose(0, 2, 1, 3, 4).reshape(-1, heads, size, features)

  weight = dense.probabilities(cut(q), cut(k), mask=real)
  y = dense.mix(weight, cut(v), real)
  y = y.reshape(images, count, heads, size, features)
  y = y.transpose(0, 2, 1, 3, 4).reshape(images, heads, count * size, features)
  at = jnp.broadcast_to(jnp.arange(count * size), (images, count * size))
  # Where each patch is; those that are padding are nowhere, and read the first.
  back = jnp.zeros((images, n), jnp.int32)
  back = back.at[jnp.arange(images)[:, None], flat[:, 0, :, 0]].set(
    at, mode="drop"
  )
  return jnp.take_along_axis(y, back[:, None, :, None], axis=2)


class NativeResolution(Reduces, nn.Module):
  """The tower, up to merged patches, with reductions behind its last block.

  Attributes:
    config: the architecture.
    slots: what a recipe returned for this tower.
    dtype: of activations; parameters stay float32.
  """

  config: NativeResolutionConfig
  slots: Slots = Slots()
  dtype: Any = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    check_slots(self.config, self.slots)

  def setup(self):
    cfg = self.config
    self.patch = nn.Dense(cfg.width, use_bias=False, dtype=self.dtype)
    self.blocks = [
      Block(cfg, i, self.dtype, name=f"block_{i}") for i in range(cfg.depth)
    ]
    self.setup_reductions()

  def __call__(
    self,
    patches: Patches,
    *,
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "k m d"], dict[str, Any]]:
    """Features of merged patches, next to each other, and `out`.

    Args:
      patches: of a batch, each padded behind its real ones.
      key: for recipes that are random.
      train: makes no difference here.

    Returns:
      features, and `out`: "tokens", which hold them (their position is the row
      and column of the merged patch), and "plans" (one or none).
    """
    del train
    cfg, (k, n, _) = self.config, patches.pixels.shape
    place, real = cells(n, patches.grid, cfg.merge)
    x = self.patch(patches.pixels.astype(self.dtype))
    tokens = tokens_of(x, place, real)
    stages = stages_of(self.slots, n // cfg.merged, cfg.depth)
    reducer = Reducer.create(
      self.slots, stages, k, masked=True, ragged=True, key=key
    )
    answers = signals.Answers()
    for i, block in enumerate(self.blocks):
      tokens, known = block(tokens, patches)
      for question in reducer.asked_of_attention(i):
        answers = answers.add(question, self._merged(known, question))
    whole = tokens_of(
      tokens.x.reshape(k, n // cfg.merged, -1),
      place[:, :: cfg.merged] // cfg.merge, real[:, :: cfg.merged],
    )  # fmt: skip
    passage = reducer.start(whole).replace(plans=((),), answers=answers)
    passage = self.reduce_at("output", cfg.depth - 1, passage, reducer)
    out = {"tokens": passage.tokens, "plans": list(passage.plans[0])}
    return passage.tokens.x, out

  def _merged(self, known: NativeAnswers, question: Question) -> Array:
    """An answer about merged patches: the mean over those of each."""
    value, size = known.answer(question), self.config.merged
    for axis in question.axes:
      # Axes from the front are those of one example.
      axis = axis + 1 if axis >= 0 else axis + value.ndim
      shape = value.shape
      value = value.reshape(*shape[:axis], -1, size, *shape[axis + 1 :])
      value = value.mean(axis=axis + 1)
    return value


def tokens_of(x, place, real) -> Tokens:
  """Tokens of a batch at rows and columns."""
  ones = jnp.ones(real.shape, jnp.float32)
  kind = jnp.full(real.shape, Kind.PATCH, jnp.int32)
  return Tokens(x, ones, place.astype(jnp.float32), kind, real)


def stages_of(slots: Slots, merged: int, depth: int) -> Stages:
  """The reductions of the tower, for images of up to so many merged patches."""
  sequence = Sequence(((Kind.PATCH, merged),), merged, 0)
  return plan_stages(
    slots.reduce, sequence, depth, recipe=slots.name, idle=merged != USUAL
  )


def check_slots(config: NativeResolutionConfig, slots: Slots) -> None:
  """Raises ValueError for slots that the tower cannot carry out."""
  what = "a vision encoder of native resolution"
  hint = (
    "its patches are merged behind the last block, so that reductions act at"
    " the output of that one; or use the recipe within the projector"
  )
  for reduce in slots.reduce:
    if reduce.at != "output":
      raise ValueError(
        f"{slots.described(reduce)} acts at {reduce.at!r} of a block of {what};"
        f" {hint}"
      )
  tower.check_slots(slots, what, ("output",), ANSWERS)
  tower.check_ragged(slots, what)
  tower.check_kinds(slots, (Kind.PATCH,))
  stages = stages_of(slots, USUAL, config.depth)
  for stage in (s for block in stages[:-1] for s in block):
    raise ValueError(
      f"{slots.described(stage.reduce)} acts behind block {stage.layer} of"
      f" {config.depth} of {what}; {hint}"
    )
