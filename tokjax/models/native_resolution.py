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
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from tokjax import signals
from tokjax.attention import core, dense
from tokjax.models import vlm_tower as tower
from tokjax.models.activations import ACTIVATIONS
from tokjax.models.answers import EncoderAnswers
from tokjax.models.decoder_layers import RMSNorm
from tokjax.models.encoder import Attention, Mlp
from tokjax.models.merged_patches import mean_of_merged
from tokjax.models.native_patches import (
  USUAL,
  NativeResolutionConfig,
  Patches,
  cells,
)
from tokjax.models.reducer import Reducer, Reduces
from tokjax.models.rotary import Rotary, turned
from tokjax.reduce.stages import Sequence, Stages, plan_stages
from tokjax.signals import Question
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens


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
        value = mean_of_merged(question, known.answer(question), cfg.merged)
        answers = answers.add(question, value)
    whole = tokens_of(
      tokens.x.reshape(k, n // cfg.merged, -1),
      place[:, :: cfg.merged] // cfg.merge, real[:, :: cfg.merged],
    )  # fmt: skip
    passage = reducer.start(whole).replace(plans=((),), answers=answers)
    passage = self.reduce_at("output", cfg.depth - 1, passage, reducer)
    out = {"tokens": passage.tokens, "plans": list(passage.plans[0])}
    return passage.tokens.x, out


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
  tower.check_slots(slots, what, ("output",), tower.ANSWERS)
  tower.check_ragged(slots, what)
  tower.check_kinds(slots, (Kind.PATCH,))
  stages = stages_of(slots, USUAL, config.depth)
  for stage in (s for block in stages[:-1] for s in block):
    raise ValueError(
      f"{slots.described(stage.reduce)} acts behind block {stage.layer} of"
      f" {config.depth} of {what}; {hint}"
    )
