"""Families of language models: config.json as values of `DecoderConfig`."""

from typing import Any

from tokjax.interop import fields
from tokjax.interop.fields import Family, Field, Json, Reader
from tokjax.interop.rope import rotary, scaling_of

ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
}


def kv_heads(part: Json, name: str) -> int:
  """Absent: as many as there are query heads."""
  absent = part.get(name) is None
  return fields.integer(part, "num_attention_heads" if absent else name)


LAYER_TYPES = {"full_attention": "full", "sliding_attention": "sliding"}


def listed_layers(part: Json) -> tuple[str, ...]:
  """`layer_types`, one for each block."""
  names = fields.strings(part, "layer_types")
  if unknown := sorted(set(names) - set(LAYER_TYPES)):
    raise ValueError(f"layer_types has {unknown}, not {list(LAYER_TYPES)}")
  depth = fields.depth(part, "num_hidden_layers")
  if len(names) != depth:
    raise ValueError(f"layer_types has {len(names)} entries for {depth} layers")
  return tuple(LAYER_TYPES[name] for name in names)


def layers(otherwise: Reader, key: str) -> Reader:
  """`layer_types` where config.json lists them, else by the family's rule.

  Args:
    otherwise: the rule.
    key: what it reads.
  """

  def read(part: Json, name: str) -> tuple[str, ...]:
    if part.get(name) is not None:
      return listed_layers(part)
    return otherwise(part, key)

  return read


def layer_types(layers: tuple[str, ...], config: Any) -> list[str]:
  """The names of the kinds of all blocks."""
  del config
  back = {ours: theirs for theirs, ours in LAYER_TYPES.items()}
  return [back[layer] for layer in layers]


def sliding_from(part: Json, name: str) -> tuple[str, ...]:
  """Qwen: blocks from `max_window_layers` on slide, if any do."""
  if not fields.optional(fields.flag)(part, "use_sliding_window"):
    return ("full",)
  if part["sliding_window"] is None:
    return ("full",)
  first = fields.natural(part, name)
  depth = fields.depth(part, "num_hidden_layers")
  return ("full",) * min(first, depth) + ("sliding",) * max(depth - first, 0)


def sliding_all(part: Json, name: str) -> tuple[str, ...]:
  """Mistral: every block slides where there is a window."""
  return ("full",) if part[name] is None else ("sliding",)


def sliding_but(part: Json, name: str) -> tuple[str, ...]:
  """Gemma: the last block of each group of this many is full."""
  count = fields.integer(part, name)
  depth = fields.depth(part, "num_hidden_layers")
  return ("sliding",) * min(count - 1, depth) + ("full",)


def window(part: Json, name: str) -> int | None:
  """Null: no window. Qwen states one also where `use_sliding_window` is off."""
  return fields.optional(fields.integer)(part, name)


def query_scalar(scale: float | None, config: Any) -> int | float:
  """Gemma's; `transformers` wants an integer where it is one."""
  value = scale or config.features
  return int(value) if value == int(value) else value


OPTIONAL_FLAG = fields.optional(fields.flag, False)
SHARED = (
  Field("vocabulary", "vocab_size", fields.integer),
  Field("width", "hidden_size", fields.integer),
  Field("depth", "num_hidden_layers", fields.depth),
  Field("heads", "num_attention_heads", fields.integer),
  Field("kv_heads", "num_key_value_heads", kv_heads),
  Field("head_dim", "head_dim", fields.optional(fields.integer)),
  Field("mlp_dim", "intermediate_size", fields.integer),
  Field("length", "max_position_embeddings", fields.integer),
  Field("epsilon", "rms_norm_eps", fields.positive),
  Field("tied", "tie_word_embeddings", fields.flag),
  Field(
    "rotary",
    "rope_theta",
    lambda part, name: rotary(part),
    lambda rotary, config: rotary.base,
    lambda rotary: {"rope_scaling": scaling_of(rotary)},
  ),
)
SILU = fields.named("activation", "hidden_act", ACTIVATIONS)
WINDOW = Field("window", "sliding_window", window)
QKV_BIAS = Field("qkv_bias", "attention_bias", OPTIONAL_FLAG)
OUT_BIAS = Field("out_bias", "attention_bias", OPTIONAL_FLAG)
SLIDING_FROM = Field(
  "layers",
  "layer_types",
  layers(sliding_from, "max_window_layers"),
  layer_types,
  lambda layers: {"use_sliding_window": "sliding" in layers},
)
# Mistral has one window for all blocks or none, which its key says.
SLIDING_ALL = Field(
  "layers", "layer_types", layers(sliding_all, "sliding_window"), None
)
SLIDING_BUT = Field(
  "layers",
  "layer_types",
  layers(sliding_but, "sliding_window_pattern"),
  layer_types,
)
MAYBE_POSITIVE = fields.optional(fields.positive)
GEMMA = (
  *SHARED,
  fields.named("activation", "hidden_activation", ACTIVATIONS),
  WINDOW,
  QKV_BIAS,
  OUT_BIAS,
  Field(
    "query_scale",
    "query_pre_attn_scalar",
    MAYBE_POSITIVE,
    query_scalar,
  ),
  Field("attention_softcap", "attn_logit_softcapping", MAYBE_POSITIVE),
  Field("logit_softcap", "final_logit_softcapping", MAYBE_POSITIVE),
  SLIDING_BUT,
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
    Field("mlp_bias", "mlp_bias", OPTIONAL_FLAG),
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
  (*SHARED, SILU, WINDOW, SLIDING_ALL),
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
  ("use_bidirectional_attention",),
)
GEMMA3 = Family(
  "gemma3_text",
  (
    *GEMMA,
    Field(
      "local_rotary",
      "rope_local_base_freq",
      lambda part, name: rotary(part, "sliding_attention"),
      lambda local, config: (local or config.rotary).base,
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
  ("use_bidirectional_attention",),
)
