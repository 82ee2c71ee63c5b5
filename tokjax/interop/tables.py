"""Names and shapes of published checkpoints: one row for each tensor.

A row says which of our parameters hold which of their tensors, and how the
axes are arranged. `{i}` is the number of a block, `{p}` the prefix of the
encoder or decoder, which differs between a bare model and one with a head, and
`{h}` that of a language model's output matrix.
Rows of parameters that a configuration does not have are not used, so one
table serves a family.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Arrange:
  """How the axes of a published tensor become ours, and back.

  Attributes:
    read: `(theirs, our shape) -> ours`.
    write: `ours -> theirs`.
  """

  read: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
  write: Callable[[np.ndarray], np.ndarray]


SAME = Arrange(lambda x, shape: x, lambda x: x)
# [out, in] and [in, out].
LINEAR = Arrange(lambda x, shape: x.T, lambda x: x.T)
# [out, in, height, width] and [height, width, in, out].
CONV = Arrange(
  lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)
# A linear layer on unfolded patches, [out, height * width * in], as a
# convolution.
UNFOLDED = Arrange(
  lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T
)
# [width] and [1, 1, width].
VECTOR = Arrange(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))
# [n, width] and [1, n, width].
TABLE = Arrange(lambda x, shape: x[None], lambda x: x[0])


@dataclasses.dataclass(frozen=True)
class Row:
  """One published tensor.

  Attributes:
    ours: our parameters in it; several are joined along its first axis.
    theirs: its name.
    arrange: the order of axes.
  """

  ours: tuple[str, ...]
  theirs: str
  arrange: Arrange = SAME


def head_prefix(prefix: str) -> str:
  """The prefix of the output matrix, from that of the decoder.

  The matrix and "model" are next to each other in the same module.
  """
  return prefix.removesuffix("model.") if prefix.endswith(".model.") else ""


def one(ours: str, theirs: str, arrange: Arrange = SAME) -> Row:
  """A tensor that holds one parameter."""
  return Row((ours,), theirs, arrange)


def linear(
  ours: str, theirs: str, arrange: Arrange = LINEAR
) -> tuple[Row, ...]:
  """Weight and bias of a linear layer (or, with CONV, of a convolution)."""
  return (
    one(f"{ours}/kernel", f"{theirs}.weight", arrange),
    one(f"{ours}/bias", f"{theirs}.bias"),
  )


def norm(ours: str, theirs: str) -> tuple[Row, ...]:
  """Scale and bias of a LayerNorm."""
  return (
    one(f"{ours}/scale", f"{theirs}.weight"),
    one(f"{ours}/bias", f"{theirs}.bias"),
  )


def fused(ours: str, theirs: str, joint: str) -> tuple[Row, ...]:
  """Query, key and value in one tensor; `joint` is `.` or `_`."""
  names = [f"{ours}/{name}" for name in ("query", "key", "value")]
  return (
    Row(tuple(f"{n}/kernel" for n in names), f"{theirs}{joint}weight", LINEAR),
    Row(tuple(f"{n}/bias" for n in names), f"{theirs}{joint}bias"),
  )


BLOCK, HF_BLOCK = "encoder/block_{i}", "{p}encoder.layer.{i}"

HF_EMBED = (
  one("embed/class_token", "{p}embeddings.cls_token"),
  one("embed/distillation_token", "{p}embeddings.distillation_token"),
  one("embed/registers", "{p}embeddings.register_tokens"),
  one("embed/position", "{p}embeddings.position_embeddings"),
  *linear("embed/patch", "{p}embeddings.patch_embeddings.projection", CONV),
)
HF_ATTENTION = (
  *linear(f"{BLOCK}/attention/query", f"{HF_BLOCK}.attention.attention.query"),
  *linear(f"{BLOCK}/attention/key", f"{HF_BLOCK}.attention.attention.key"),
  *linear(f"{BLOCK}/attention/value", f"{HF_BLOCK}.attention.attention.value"),
  *linear(f"{BLOCK}/attention/out", f"{HF_BLOCK}.attention.output.dense"),
)

# ViT, DeiT and the encoder of ViT-MAE.
VIT = (
  *HF_EMBED,
  *norm(f"{BLOCK}/norm1", f"{HF_BLOCK}.layernorm_before"),
  *HF_ATTENTION,
  *norm(f"{BLOCK}/norm2", f"{HF_BLOCK}.layernorm_after"),
  *linear(f"{BLOCK}/mlp/fc1", f"{HF_BLOCK}.intermediate.dense"),
  *linear(f"{BLOCK}/mlp/fc2", f"{HF_BLOCK}.output.dense"),
  *norm("head/norm", "{p}layernorm"),
  *linear("head/pooler", "{p}pooler.dense"),
)

# DINOv2, with and without registers.
DINO = (
  *HF_EMBED,
  *norm(f"{BLOCK}/norm1", f"{HF_BLOCK}.norm1"),
  *HF_ATTENTION,
  one(f"{BLOCK}/scale1", f"{HF_BLOCK}.layer_scale1.lambda1"),
  *norm(f"{BLOCK}/norm2", f"{HF_BLOCK}.norm2"),
  *linear(f"{BLOCK}/mlp/fc1", f"{HF_BLOCK}.mlp.fc1"),
  *linear(f"{BLOCK}/mlp/fc2", f"{HF_BLOCK}.mlp.fc2"),
  one(f"{BLOCK}/scale2", f"{HF_BLOCK}.layer_scale2.lambda1"),
  *norm("head/norm", "{p}layernorm"),
)

CLIP_BLOCK = "{p}encoder.layers.{i}"
CLIP_ENCODER = (
  one("embed/position", "{p}embeddings.position_embedding.weight", TABLE),
  *norm(f"{BLOCK}/norm1", f"{CLIP_BLOCK}.layer_norm1"),
  *linear(f"{BLOCK}/attention/query", f"{CLIP_BLOCK}.self_attn.q_proj"),
  *linear(f"{BLOCK}/attention/key", f"{CLIP_BLOCK}.self_attn.k_proj"),
  *linear(f"{BLOCK}/attention/value", f"{CLIP_BLOCK}.self_attn.v_proj"),
  *linear(f"{BLOCK}/attention/out", f"{CLIP_BLOCK}.self_attn.out_proj"),
  *norm(f"{BLOCK}/norm2", f"{CLIP_BLOCK}.layer_norm2"),
  *linear(f"{BLOCK}/mlp/fc1", f"{CLIP_BLOCK}.mlp.fc1"),
  *linear(f"{BLOCK}/mlp/fc2", f"{CLIP_BLOCK}.mlp.fc2"),
  *norm("head/norm", "{p}post_layernorm"),
)
CLIP = (
  one("embed/class_token", "{p}embeddings.class_embedding", VECTOR),
  *linear("embed/patch", "{p}embeddings.patch_embedding", CONV),
  # The published name has this spelling.
  *norm("embed/pre_norm", "{p}pre_layrnorm"),
  *CLIP_ENCODER,
  one("head/projection/kernel", "visual_projection.weight", LINEAR),
)
SIGLIP_HEAD = (
  one("head/pool/probe", "{p}head.probe"),
  *fused("head/pool/attention", "{p}head.attention.in_proj", "_"),
  *linear("head/pool/attention/out", "{p}head.attention.out_proj"),
  *norm("head/pool/norm", "{p}head.layernorm"),
  *linear("head/pool/mlp/fc1", "{p}head.mlp.fc1"),
  *linear("head/pool/mlp/fc2", "{p}head.mlp.fc2"),
)
SIGLIP = (
  *linear("embed/patch", "{p}embeddings.patch_embedding", CONV),
  *CLIP_ENCODER,
  *SIGLIP_HEAD,
)
# SigLIP 2 with native aspect ratio embeds unfolded patches.
SIGLIP2 = (
  *linear("embed/patch", "{p}embeddings.patch_embedding", UNFOLDED),
  *CLIP_ENCODER,
  *SIGLIP_HEAD,
)

# timm's VisionTransformer; the distilled one has the rows with `dist`.
TIMM_BLOCK = "blocks.{i}"
TIMM = (
  one("embed/class_token", "cls_token"),
  one("embed/distillation_token", "dist_token"),
  one("embed/registers", "reg_token"),
  one("embed/position", "pos_embed"),
  *linear("embed/patch", "patch_embed.proj", CONV),
  *norm("embed/pre_norm", "norm_pre"),
  *norm(f"{BLOCK}/norm1", f"{TIMM_BLOCK}.norm1"),
  *fused(f"{BLOCK}/attention", f"{TIMM_BLOCK}.attn.qkv", "."),
  *linear(f"{BLOCK}/attention/out", f"{TIMM_BLOCK}.attn.proj"),
  one(f"{BLOCK}/scale1", f"{TIMM_BLOCK}.ls1.gamma"),
  *norm(f"{BLOCK}/norm2", f"{TIMM_BLOCK}.norm2"),
  *linear(f"{BLOCK}/mlp/fc1", f"{TIMM_BLOCK}.mlp.fc1"),
  *linear(f"{BLOCK}/mlp/fc2", f"{TIMM_BLOCK}.mlp.fc2"),
  one(f"{BLOCK}/scale2", f"{TIMM_BLOCK}.ls2.gamma"),
  *linear("head/classifier", "head"),
  *linear("head/distillation_classifier", "head_dist"),
)
TIMM_NORM = norm("head/norm", "norm")
TIMM_POOLED_NORM = norm("head/norm", "fc_norm")

# Decoder-only language models; Gemma has four norms a block, others two.
LAYER, HF_LAYER = "block_{i}", "{p}layers.{i}"
DECODER = (
  one("embed/embedding", "{p}embed_tokens.weight"),
  one(f"{LAYER}/norm1/scale", f"{HF_LAYER}.input_layernorm.weight"),
  *linear(f"{LAYER}/attention/query", f"{HF_LAYER}.self_attn.q_proj"),
  *linear(f"{LAYER}/attention/key", f"{HF_LAYER}.self_attn.k_proj"),
  *linear(f"{LAYER}/attention/value", f"{HF_LAYER}.self_attn.v_proj"),
  *linear(f"{LAYER}/attention/out", f"{HF_LAYER}.self_attn.o_proj"),
  one(
    f"{LAYER}/attention/query_norm/scale", f"{HF_LAYER}.self_attn.q_norm.weight"
  ),
  one(
    f"{LAYER}/attention/key_norm/scale", f"{HF_LAYER}.self_attn.k_norm.weight"
  ),
  *linear(f"{LAYER}/mlp/gate", f"{HF_LAYER}.mlp.gate_proj"),
  *linear(f"{LAYER}/mlp/up", f"{HF_LAYER}.mlp.up_proj"),
  *linear(f"{LAYER}/mlp/down", f"{HF_LAYER}.mlp.down_proj"),
  one("norm/scale", "{p}norm.weight"),
  one("head/kernel", "{h}lm_head.weight", LINEAR),
)
TWO_NORMS = (
  one(f"{LAYER}/norm2/scale", f"{HF_LAYER}.post_attention_layernorm.weight"),
)
FOUR_NORMS = (
  one(
    f"{LAYER}/post_norm1/scale", f"{HF_LAYER}.post_attention_layernorm.weight"
  ),
  one(f"{LAYER}/norm2/scale", f"{HF_LAYER}.pre_feedforward_layernorm.weight"),
  one(
    f"{LAYER}/post_norm2/scale", f"{HF_LAYER}.post_feedforward_layernorm.weight"
  ),
)
