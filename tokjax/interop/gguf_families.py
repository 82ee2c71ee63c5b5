"""Metadata of GGUF files as values of `DecoderConfig`, a family for each kind.

Keys are llama.cpp's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
and the constants of its package `gguf`); what a file does not state has the
value that llama.cpp takes.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tokjax.interop import fields
from tokjax.interop.fields import Family, Field, Json, Problems, Reader
from tokjax.interop.tensors import Header
from tokjax.models.rotary import Rotary

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
FREQUENCIES = "rope_freqs.weight"
SCALINGS = {"none": "none", "linear": "linear", "yarn": "yarn"}
# What changes a model in ways that `Decoder` does not carry out.
REFUSED = (
  "attention.clamp_kqv",
  "attention.key_length_mla",
  "attention.max_alibi_bias",
  "attention.output_scale",
  "attention.shared_kv_layers",
  "attention.temperature_length",
  "attention.temperature_scale",
  "embedding_scale",
  "expert_count",
  "logit_scale",
  "nextn_predict_layers",
  "pooling_type",
  "residual_scale",
  "rope.dimension_sections",
  "rope.scaling.alpha",
  "rope.scaling.yarn_ext_factor",
  "rope.scaling.yarn_log_multiplier",
  "router_logit_softcapping",
  "use_parallel_residual",
)
MAYBE_POSITIVE = fields.optional(fields.positive)
MAYBE_INTEGER = fields.optional(fields.integer)


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One value of `general.architecture`.

  Attributes:
    name: that value.
    implied: values of `DecoderConfig` that follow from it.
    defaults: metadata that a file may leave out, without the name in front.
    permuted: query and key weights are stored for rotation of neighbours
      (i, i + 1), and are put back to pairs (i, i + k/2).
    offset: norms are stored with 1 added (Gemma).
    four_norms: attention and MLP have a norm behind them, too (Gemma).
    wide_depth: at this depth query_scale is width / heads (the largest Gemma
      models; no key states it).
    local: sliding layers have positions of their own (Gemma 3).
  """

  name: str
  implied: Json = dataclasses.field(default_factory=dict)
  defaults: Json = dataclasses.field(default_factory=dict)
  permuted: bool = False
  offset: bool = False
  four_norms: bool = False
  wide_depth: int | None = None
  local: bool = False

  def key(self, name: str) -> str:
    """A key with the architecture's name in front."""
    return f"{self.name}.{name}"

  def family(self) -> Family:
    """How its metadata is written."""
    stated = (
      ("width", "embedding_length", fields.integer),
      ("depth", "block_count", fields.depth),
      ("heads", "attention.head_count", fields.integer),
      ("kv_heads", "attention.head_count_kv", self._kv_heads),
      ("head_dim", "attention.key_length", self._head_dim),
      ("mlp_dim", "feed_forward_length", same_integer),
      ("length", "context_length", fields.integer),
      ("epsilon", "attention.layer_norm_rms_epsilon", fields.positive),
      ("window", "attention.sliding_window", fields.optional(window)),
      ("layers", "attention.sliding_window_pattern", self._layers),
      ("query_scale", "attention.scale", self._query_scale),
      ("attention_softcap", "attn_logit_softcapping", MAYBE_POSITIVE),
      ("logit_softcap", "final_logit_softcapping", MAYBE_POSITIVE),
      ("rotary", "rope.freq_base", self._rotary),
    )
    if self.local:
      stated += (("local_rotary", "rope.freq_base_swa", self._local_rotary),)
    return Family(
      self.name,
      tuple(Field(ours, self.key(name), read) for ours, name, read in stated),
      {self.key(name): value for name, value in self.defaults.items()},
      self.implied,
      tuple(self.key(name) for name in REFUSED),
    )

  def _kv_heads(self, part: Json, name: str) -> int:
    """Absent: as many as there are query heads."""
    absent = part.get(name) is None
    heads = self.key("attention.head_count")
    return same_integer(part, heads if absent else name)

  def _head_dim(self, part: Json, name: str) -> int | None:
    found = MAYBE_INTEGER(part, name)
    width = fields.integer(part, self.key("embedding_length"))
    heads = fields.integer(part, self.key("attention.head_count"))
    for other in ("attention.value_length", "rope.dimension_count"):
      stated = MAYBE_INTEGER(part, self.key(other))
      if stated not in (None, found or width // heads):
        raise ValueError(
          f"{self.key(other)}={stated}: must be the features of a head,"
          f" {found or width // heads}"
        )
    return found

  def _layers(self, part: Json, name: str) -> tuple[str, ...]:
    """A pattern: the last of each group is full, or a flag for each layer."""
    if part.get(self.key("attention.sliding_window")) in (None, 0):
      return ("full",)
    pattern = part.get(name)
    depth = fields.depth(part, self.key("block_count"))
    if isinstance(pattern, np.ndarray):
      if pattern.shape != (depth,):
        raise fields.wrong(name, pattern, f"a list of {depth} flags")
      return tuple("sliding" if slides else "full" for slides in pattern)
    if pattern is None:
      return ("sliding",)
    count = fields.integer(part, name)
    return ("sliding",) * min(count - 1, depth) + ("full",)

  def _query_scale(self, part: Json, name: str) -> float | None:
    scale = MAYBE_POSITIVE(part, name)
    if scale is not None:
      return scale**-2
    if self.wide_depth is None:
      return None
    if part.get(self.key("block_count")) != self.wide_depth:
      return None
    width = fields.integer(part, self.key("embedding_length"))
    return width / fields.integer(part, self.key("attention.head_count"))

  def _rotary(self, part: Json, name: str) -> Rotary:
    """Llama 3's rule is in a tensor: `with_frequencies` adds it."""
    problems, values = Problems(self.key("rope")), {}
    with problems.collect():
      values["base"] = fields.optional(fields.positive, 10_000.0)(part, name)
    with problems.collect():
      values |= self._scaling(part)
    return problems.build(Rotary, values)

  def _scaling(self, part: Json) -> dict[str, Any]:
    def stated(name: str, read: Reader, default: Any = None) -> Any:
      key = self.key(f"rope.scaling.{name}")
      return fields.optional(read, default)(part, key)

    old = MAYBE_POSITIVE(part, self.key("rope.scale_linear"))
    rule = stated("type", fields.one_of(SCALINGS), "linear" if old else "none")
    if rule == "none":
      return {}
    values = {"scaling": rule, "factor": stated("factor", fields.positive, old)}
    if values["factor"] is None:
      raise ValueError(f"has no {self.key('rope.scaling.factor')!r}")
    if rule == "linear":
      return values
    length = fields.integer(part, self.key("context_length"))
    more = stated("attn_factor", fields.positive, 1.0)
    more *= stated("yarn_attn_factor", fields.positive, 1.0)
    return {
      **values,
      "original_length": stated(
        "original_context_length", fields.integer, length
      ),
      "slow": stated("yarn_beta_slow", fields.positive, 1.0),
      "fast": stated("yarn_beta_fast", fields.positive, 32.0),
      # None has the same value; equal models have equal configurations.
      "attention_factor": None
      if more == 1
      else more * (0.1 * math.log(values["factor"]) + 1),
    }

  def _local_rotary(self, part: Json, name: str) -> Rotary:
    return Rotary(fields.optional(fields.positive, 10_000.0)(part, name))

  def read(
    self, metadata: Json, headers: Mapping[str, Header], problems: Problems
  ) -> dict[str, Any]:
    """Values of a `DecoderConfig`; faults are added to `problems`.

    The vocabulary, biases and whether the embedding is the output matrix, only
    the tensors show.
    """
    values = self.family().read(metadata, problems)
    with problems.collect():
      if metadata.get(self.key("attention.causal"), True) is not True:
        raise ValueError(
          f"{self.key('attention.causal')} is false: an encoder, no language"
          " model"
        )
    with problems.collect():
      if EMBEDDING not in headers:
        raise ValueError(f"has no tensor {EMBEDDING}")
      rows = headers[EMBEDDING].shape[0]
      name = self.key("vocab_size")
      if MAYBE_INTEGER(metadata, name) not in (None, rows):
        raise ValueError(
          f"{name}={metadata[name]}: {EMBEDDING} has {rows} rows"
        )
      values["vocabulary"] = rows
    biases = {"qkv_bias": "attn_q", "out_bias": "attn_output"}
    biases["mlp_bias"] = "ffn_gate"
    for ours, theirs in biases.items():
      values[ours] = f"blk.0.{theirs}.bias" in headers
    return {**values, "tied": HEAD not in headers}


def window(part: Json, name: str) -> int | None:
  """0 means none."""
  return fields.natural(part, name) or None


def same_integer(part: Json, name: str) -> int:
  """One number, or a list of equal ones for the layers."""
  value = part.get(name)
  if isinstance(value, np.ndarray):
    found = set(value.tolist())
    if len(found) != 1:
      raise fields.wrong(name, value.tolist(), "the same for all layers")
    return fields.integer({name: found.pop()}, name)
  return fields.integer(part, name)


def with_frequencies(rotary: Rotary, factors: np.ndarray) -> Rotary:
  """Positions with Llama 3's rule, from what it divides frequencies by.

  llama.cpp stores that instead of the numbers of the rule. The largest divisor
  is `factor`; `slow` and `fast` are 1 and 4 in every published model, and the
  original length a power of two.

  Args:
    rotary: the base.
    factors: one for each pair, `[features / 2]`.

  Raises:
    ValueError: no such rule gives these factors.
  """
  factors = np.asarray(factors, np.float32)
  plain_rule = rotary.scaling == "none" and factors.ndim == 1 and factors.size
  if plain_rule and np.isfinite(factors).all():
    if (factors == 1).all():
      return rotary
    plain = np.asarray(rotary.frequencies(2 * len(factors)))
    for power in range(3, 25):
      made = dataclasses.replace(
        rotary,
        scaling="llama3",
        factor=max(1.0, float(factors.max())),
        original_length=2**power,
        slow=1.0,
        fast=4.0,
      )
      ours = plain / np.asarray(made.frequencies(2 * len(factors)))
      if np.allclose(ours, factors, rtol=1e-4):
        return made
  raise ValueError(
    f"{FREQUENCIES} is not Llama 3's rule with slow=1, fast=4 and a power of"
    " two as original length, which is the one that is read"
  )


GEMMA: dict[str, Any] = dict(
  post_norms=True,
  norm_from_one=True,
  embed_scale=True,
  activation="gelu_tanh",
)
ARCHITECTURES: Mapping[str, Architecture] = {
  made.name: made
  for made in (
    # Mistral's files have this name, too.
    Architecture("llama", permuted=True),
    Architecture("qwen2"),
    Architecture("qwen3", {"qk_norm": True}),
    Architecture(
      "gemma2",
      GEMMA,
      {
        "attention.sliding_window": 4096,
        "attention.sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
      },
      offset=True,
      four_norms=True,
      wide_depth=46,
    ),
    Architecture(
      "gemma3",
      {**GEMMA, "qk_norm": True},
      {"attention.sliding_window_pattern": 6},
      offset=True,
      four_norms=True,
      wide_depth=62,
      local=True,
    ),
  )
}
