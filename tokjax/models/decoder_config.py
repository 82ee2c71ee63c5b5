"""The architecture of a decoder-only language model."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from tokjax.models import faults
from tokjax.models.activations import ACTIVATIONS
from tokjax.models.rotary import Rotary

LAYERS = ("full", "sliding")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """One transformer for Llama, Mistral, Qwen and Gemma; they differ in values.

  Attributes:
    vocabulary: number of token ids.
    width, depth, mlp_dim: of the residual stream, blocks, the gated MLP.
    heads, kv_heads: query heads, and key-value heads that they share.
    head_dim: features of a head; None: width / heads.
    length: the longest context it was made for, in tokens.
    layers: "full" or "sliding" for each block, repeated along the depth.
    window: keys a query of a sliding layer sees, itself included.
    rotary, local_rotary: positions; `local_rotary`: those of sliding layers
      (Gemma 3), None: the same. Positions have as many axes as `sections` of
      `rotary`, without sections one.
    activation: of the gate.
    epsilon: of the norms.
    qkv_bias, out_bias, mlp_bias: which projections have a bias.
    qk_norm: queries and keys are normed per head before the rotation
      (Qwen 3, Gemma 3).
    post_norms: attention and MLP are also normed before they are added
      (Gemma).
    norm_from_one: norms multiply by 1 + scale (Gemma).
    embed_scale: embeddings are multiplied by sqrt(width), rounded to the
      dtype of activations (Gemma).
    query_scale: what logits of attention are divided by the square root of;
      None: head_dim.
    attention_softcap, logit_softcap: c in c tanh(x / c), on the logits of
      attention and of tokens (Gemma 2); None: none.
    tied: the embedding is also the output matrix.
  """

  vocabulary: int = 256
  width: int = 64
  depth: int = 2
  heads: int = 4
  kv_heads: int = 4
  head_dim: int | None = None
  mlp_dim: int = 256
  length: int = 2048
  layers: tuple[Literal["full", "sliding"], ...] = ("full",)
  window: int | None = None
  rotary: Rotary = Rotary()
  local_rotary: Rotary | None = None
  activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
  epsilon: float = 1e-6
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False
  post_norms: bool = False
  norm_from_one: bool = False
  embed_scale: bool = False
  query_scale: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  tied: bool = True

  def __post_init__(self):
    faults.check(self._fields())
    faults.check(self._relations())

  def _fields(self) -> Iterator[str]:
    """Faults of single fields."""
    sizes = ("vocabulary", "width", "depth", "heads", "kv_heads", "mlp_dim")
    yield from faults.integers(self, (*sizes, "length"), 1)
    maybe = [n for n in ("head_dim", "window") if getattr(self, n) is not None]
    yield from faults.integers(self, maybe, 1)
    real = ("epsilon", "query_scale", "attention_softcap", "logit_softcap")
    yield from faults.positives(self, real)
    if self.epsilon is None:
      yield "epsilon=None: must be a finite number above 0"
    if not self.layers or set(self.layers) - set(LAYERS):
      yield f"layers={self.layers}: entries must be of {LAYERS}"
    if self.activation not in ACTIVATIONS:
      yield (
        f"activation={self.activation!r}: must be one of {sorted(ACTIVATIONS)}"
      )

  def _relations(self) -> Iterator[str]:
    """Faults between fields that are each allowed."""
    if self.head_dim is None and self.width % self.heads:
      yield (
        f"width={self.width}: must be a multiple of heads={self.heads}, or"
        " head_dim be given"
      )
    elif self.features % 2:
      yield f"{self.features} features a head: must be even"
    if self.heads % self.kv_heads:
      yield (
        f"heads={self.heads}: must be a multiple of kv_heads={self.kv_heads}"
      )
    if "sliding" in self.layers and self.window is None:
      yield f"window={self.window}: sliding layers need 1 or more"
    if self.axes > 1 and 2 * sum(self.rotary.sections) != self.features:
      yield (
        f"rotary: sections={self.rotary.sections}: must sum to"
        f" {self.features // 2}, half of the {self.features} features a head"
      )
    if self.local_rotary and self.local_rotary.sections != self.rotary.sections:
      yield "local_rotary: must have the sections of rotary"
    if self.features < 4 and "dynamic" in (
      rotary.scaling for rotary in (self.rotary, self.local_rotary) if rotary
    ):
      yield f"{self.features} features a head: dynamic positions need 4 or more"

  @property
  def features(self) -> int:
    """Features of a head."""
    return self.head_dim or self.width // self.heads

  @property
  def axes(self) -> int:
    """Axes of positions."""
    return len(self.rotary.sections) or 1

  @property
  def attention_scale(self) -> float:
    """What logits of attention are multiplied by."""
    return (self.query_scale or self.features) ** -0.5

  def layer(self, index: int) -> str:
    """Whether a block is "full" or "sliding"."""
    return self.layers[index % len(self.layers)]

  def window_of(self, index: int) -> int | None:
    """Keys a query of a block sees; None: all before it."""
    return self.window if self.layer(index) == "sliding" else None

  def rotary_of(self, index: int) -> Rotary:
    """The positions of a block."""
    sliding = self.layer(index) == "sliding"
    return (sliding and self.local_rotary) or self.rotary

  def check_generation(self, prompt: int, decode: int) -> None:
    """Refuses texts that outgrow positions whose frequencies depend on length.

    Beyond the original length of a "dynamic" rule, each new token changes the
    rotation of all earlier ones. To store keys before rotation does not help
    beyond the first block: later keys were computed from hidden states that
    saw the earlier rotation. Measured on random weights of 1, 2 and 4 blocks,
    nine tokens beyond the original length, largest difference of logits from
    those of the whole text: 2e-7, 8e-4, 1e-2; with rotated keys 6e-3, 1e-2,
    2e-2. A call on a whole text has no such limit.

    Args:
      prompt: the longest prompt, in tokens.
      decode: how many tokens can follow.

    Raises:
      ValueError: names both, the limit and what to do.
    """
    used = {self.rotary_of(i) for i in range(self.depth)}
    limits = [r for r in used if r.scaling == "dynamic"]
    rotary = min(limits, key=lambda r: r.original_length, default=None)
    if rotary is None or prompt + decode <= rotary.original_length:
      return
    raise ValueError(
      f"prompts of {prompt} tokens and {decode} more: positions with"
      f" scaling='dynamic' change for all tokens once a text is longer than"
      f" original_length={rotary.original_length}, and caches hold what was"
      " computed before; stay within that length, or use a rule that does not"
      " change, such as scaling='yarn' (interop.load(..., rotary=Rotary(...)))"
    )
