"""Small random language models of the reference implementation."""

import pytest

torch = pytest.importorskip(
  "torch", reason="parity is measured where torch is installed"
)
transformers = pytest.importorskip(
  "transformers", reason="parity is measured where transformers is installed"
)

SIZE = dict(
  vocab_size=50,
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  intermediate_size=48,
  bos_token_id=1,
  eos_token_id=2,
  pad_token_id=0,
)
LLAMA3 = dict(
  rope_type="llama3",
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
  rope_theta=500.0,
)
YARN = dict(
  rope_type="yarn",
  factor=4.0,
  original_max_position_embeddings=16,
  rope_theta=1000.0,
)


def rope(kind, **options):
  return dict(rope_type=kind, rope_theta=100.0, **options)


# The class's prefix, and how its configuration differs from SIZE.
REFERENCES = {
  "llama2": ("Llama", dict(num_key_value_heads=4)),
  "llama2-biased": (
    "Llama",
    dict(attention_bias=True, mlp_bias=True, rope_parameters=rope("default")),
  ),
  "llama-linear": ("Llama", dict(rope_parameters=rope("linear", factor=2.0))),
  # 12 tokens are more than the 8 it was made for.
  "llama-dynamic": (
    "Llama",
    dict(
      rope_parameters=rope("dynamic", factor=2.0), max_position_embeddings=8
    ),
  ),
  "llama3": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
  "mistral": ("Mistral", dict(sliding_window=4)),
  "mistral-full": ("Mistral", dict(sliding_window=None, head_dim=12)),
  "qwen2": (
    "Qwen2",
    dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
  ),
  "qwen2-yarn": (
    "Qwen2", dict(rope_parameters=YARN, tie_word_embeddings=True),
  ),
  "qwen3": ("Qwen3", dict(head_dim=16)),
  "gemma2": (
    "Gemma2",
    dict(
      head_dim=12,
      sliding_window=4,
      query_pre_attn_scalar=20,
      attn_logit_softcapping=3.0,
      final_logit_softcapping=2.0,
    ),
  ),
  "gemma3": (
    "Gemma3",
    dict(
      head_dim=16,
      sliding_window=4,
      num_hidden_layers=3,
      layer_types=["sliding_attention", "full_attention", "sliding_attention"],
      query_pre_attn_scalar=20,
      rope_parameters={
        "full_attention": rope("linear", factor=4.0),
        "sliding_attention": dict(rope_type="default", rope_theta=30.0),
      },
    ),
  ),
}  # fmt: skip


def make(name, seed=0):
  """The named model with every parameter drawn."""
  prefix, options = REFERENCES[name]
  config_name = {"Gemma3": "Gemma3Text"}.get(prefix, prefix) + "Config"
  config = getattr(transformers, config_name)(**{**SIZE, **options})
  config._attn_implementation = "eager"
  model = getattr(transformers, f"{prefix}ForCausalLM")(config)
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for key, value in model.named_parameters():
      noise = torch.randn(value.shape, generator=generator)
      spread = value.dim() > 1 and value.shape[-1] ** -0.5
      near_one = "norm" in key and "Gemma" not in prefix
      value.copy_(noise * (spread or 0.3) + near_one)
    # Distinct logits: an embedding that is also the output is small.
    model.get_input_embeddings().weight.mul_(2.0)
  return model.eval()
