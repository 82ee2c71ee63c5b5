"""Families of language models: config.json as values of `DecoderConfig`.

Both spellings are read: `rope_theta` with `rope_scaling`, as published, and
`rope_parameters`, as `transformers` 5 writes.
"""

import math
from collections.abc import Mapping
from typing import Any

from tokjax.interop.families_vision import Family, Field, Json
from tokjax.models.rotary import Rotary

ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
}
# Their names of the rules of `Rotary`.
SCALINGS = {
  "default": "none",
  "linear": "linear",
  "dynamic": "dynamic",
  "llama3": "llama3",
  "yarn": "yarn",
}


def activation(value: str, whole: Json) -> str:
  """The activation a name stands for."""
  del whole
  if value not in ACTIVATIONS:
    raise ValueError(f"{value!r}: must be one of {sorted(ACTIVATIONS)}")
  return ACTIVATIONS[value]


def kv_heads(value: int | None, whole: Json) -> int:
  """Absent: as many as there are query heads."""
  return whole["num_attention_heads"] if value is None else value


def number(value: int | float | None, whole: Json) -> float | None:
  """Written as an integer or not."""
  del whole
  return None if value is None else float(value)


def bias(value: bool | None, whole: Json) -> bool:
  """Absent: none."""
  del whole
  return bool(value)


def sliding_from(value: int, whole: Json) -> tuple[str, ...]:
  """Qwen: blocks from `max_window_layers` on slide, if any do."""
  if not whole.get("use_sliding_window") or whole["sliding_window"] is None:
    return ("full",)
  depth = whole["num_hidden_layers"]
  return ("full",) * min(value, depth) + ("sliding",) * max(depth - value, 0)


def sliding_all(value: int | None, whole: Json) -> tuple[str, ...]:
  """Mistral: every block slides where there is a window."""
  del whole
  return ("full",) if value is None else ("sliding",)


def sliding_but(value: int, whole: Json) -> tuple[str, ...]:
  """Gemma: every `value`-th block is full."""
  del whole
  return ("sliding",) * (value - 1) + ("full",)


def layers(otherwise):
  """`layer_types` where config.json lists them, else by the family's rule."""

  def read(value: Any, whole: Json) -> tuple[str, ...]:
    names = whole.get("layer_types")
    if names is None:
      return otherwise(value, whole)
    known = {"full_attention": "full", "sliding_attention": "sliding"}
    if unknown := sorted(set(names) - set(known)):
      raise ValueError(f"{value}: layer_types has {unknown}, not {list(known)}")
    return tuple(known[name] for name in names)

  return read


def rope(part: Json, layer_type: str) -> Mapping[str, Any]:
  """The entries that say how positions turn, in either spelling."""
  entries = part.get("rope_parameters") or {}
  entries = entries.get(layer_type) or entries
  if layer_type == "sliding_attention" and not entries:
    # Gemma 3 as published: local layers have a base and no scaling.
    return {"rope_theta": part["rope_local_base_freq"]}
  published = {"rope_theta": part["rope_theta"]}
  return {**published, **(part.get("rope_scaling") or {}), **entries}


def rotary(part: Json, layer_type: str = "full_attention") -> Rotary:
  """The positions of one kind of layer.

  Raises:
    ValueError: a scaling rule that `Rotary` does not have.
  """
  entries = rope(part, layer_type)
  name = entries.get("rope_type", entries.get("type", "default"))
  if name not in SCALINGS:
    raise ValueError(f"rope_type={name!r}: must be one of {sorted(SCALINGS)}")
  if entries.get("partial_rotary_factor", 1.0) != 1.0:
    raise ValueError("partial_rotary_factor: only 1.0 is supported")
  base, scaling = float(entries["rope_theta"]), SCALINGS[name]
  if scaling == "none":
    return Rotary(base)
  longest = part["max_position_embeddings"]
  known = entries.get("original_max_position_embeddings") or longest
  if scaling == "linear":
    return Rotary(base, "linear", float(entries["factor"]))
  if scaling == "dynamic":
    return Rotary(base, "dynamic", float(entries["factor"]), longest)
  if scaling == "llama3":
    low, high = entries["low_freq_factor"], entries["high_freq_factor"]
    factor = float(entries["factor"])
    return Rotary(base, "llama3", factor, known, float(low), float(high))
  factor = float(entries.get("factor") or longest / known)
  return Rotary(
    base,
    "yarn",
    factor,
    known,
    slow=float(entries.get("beta_slow") or 1),
    fast=float(entries.get("beta_fast") or 32),
    attention_factor=attention_factor(entries, factor),
    truncate=entries.get("truncate", True),
  )


def attention_factor(entries: Json, factor: float) -> float | None:
  """YaRN's, which some configurations state through two `mscale`."""
  top, bottom = entries.get("mscale"), entries.get("mscale_all_dim")
  if entries.get("attention_factor") is None and top and bottom:
    of = lambda scale: 0.1 * scale * math.log(factor) + 1
    return of(top) / of(bottom)
  return entries.get("attention_factor")


SHARED = (
  Field("vocabulary", "vocab_size"),
  Field("width", "hidden_size"),
  Field("depth", "num_hidden_layers"),
  Field("heads", "num_attention_heads"),
  Field("kv_heads", "num_key_value_heads", kv_heads),
  Field("head_dim", "head_dim"),
  Field("mlp_dim", "intermediate_size"),
  Field("length", "max_position_embeddings"),
  Field("epsilon", "rms_norm_eps"),
  Field("tied", "tie_word_embeddings"),
  Field("rotary", "rope_theta", lambda base, whole: rotary(whole)),
)
SILU = Field("activation", "hidden_act", activation)
WINDOW = Field("window", "sliding_window")
QKV_BIAS = Field("qkv_bias", "attention_bias", bias)
OUT_BIAS = Field("out_bias", "attention_bias", bias)
SLIDING_FROM = Field("layers", "max_window_layers", layers(sliding_from))
GEMMA = (
  *SHARED,
  Field("activation", "hidden_activation", activation),
  WINDOW,
  QKV_BIAS,
  OUT_BIAS,
  Field("query_scale", "query_pre_attn_scalar", number),
  Field("attention_softcap", "attn_logit_softcapping", number),
  Field("logit_softcap", "final_logit_softcapping", number),
  Field("layers", "sliding_window_pattern", layers(sliding_but)),
)

BASE = {
  "num_key_value_heads": None,
  "head_dim": None,
  "hidden_act": "silu",
  "rms_norm_eps": 1e-6,
  "rope_theta": 10_000.0,
  "tie_word_embeddings": False,
  "max_position_embeddings": 32_768,
}
QWEN_DEFAULTS = {**BASE, "sliding_window": 4096, "max_window_layers": 28}
GEMMA_DEFAULTS = {
  **BASE,
  "head_dim": 256,
  "hidden_activation": "gelu_pytorch_tanh",
  "tie_word_embeddings": True,
  "attention_bias": False,
  "query_pre_attn_scalar": 256,
  "sliding_window": 4096,
}
GEMMA_IMPLIED = {
  "post_norms": True,
  "norm_from_one": True,
  "embed_scale": True,
}

LLAMA = Family(
  "llama",
  (
    *SHARED,
    SILU,
    QKV_BIAS,
    OUT_BIAS,
    Field("mlp_bias", "mlp_bias", bias),
  ),
  {
    **BASE,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 2048,
  },
  {},
)
MISTRAL = Family(
  "mistral",
  (*SHARED, SILU, WINDOW, Field("layers", "sliding_window", sliding_all)),
  {
    **BASE,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "max_position_embeddings": 131_072,
  },
  {},
)
QWEN2 = Family(
  "qwen2",
  (*SHARED, SILU, WINDOW, SLIDING_FROM),
  {**QWEN_DEFAULTS, "num_key_value_heads": 32},
  {"qkv_bias": True},
)
QWEN3 = Family(
  "qwen3",
  (*SHARED, SILU, WINDOW, SLIDING_FROM, QKV_BIAS, OUT_BIAS),
  {
    **QWEN_DEFAULTS,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "attention_bias": False,
  },
  {"qk_norm": True},
)
GEMMA2 = Family(
  "gemma2",
  GEMMA,
  {
    **GEMMA_DEFAULTS,
    "num_key_value_heads": 4,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window_pattern": 2,
    "max_position_embeddings": 8192,
  },
  GEMMA_IMPLIED,
  {"use_bidirectional_attention": True},
)
GEMMA3 = Family(
  "gemma3_text",
  (
    *GEMMA,
    Field(
      "local_rotary",
      "rope_local_base_freq",
      lambda base, whole: rotary(whole, "sliding_attention"),
    ),
  ),
  {
    **GEMMA_DEFAULTS,
    "num_key_value_heads": 4,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "max_position_embeddings": 131_072,
  },
  {**GEMMA_IMPLIED, "qk_norm": True},
  {"use_bidirectional_attention": True},
)
