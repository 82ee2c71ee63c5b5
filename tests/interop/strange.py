"""Any JSON value in any place of a published file: followed, or one error.

A program, because run-time type checks, which pytest switches on, make it
thirty times slower; test_fields.py runs it.
"""

import math

from tests.interop.checkpoints import QWEN
from tokjax import interop
from tokjax.interop.architectures_language import LANGUAGE
from tokjax.interop.architectures_vision import VISION
from tokjax.interop.preprocessing_files import from_hf
from tokjax.interop.preprocessing_timm import from_timm
from tokjax.interop.timm import DEFAULTS, NEEDED, Timm

DEEP: list = []
for _ in range(2000):
  DEEP = [DEEP]
STRANGE = (
  None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e-320, 1e308, 10**9, 10**400,
  -(10**400), math.nan, math.inf, -math.inf, "", "8", "default", "yarn", [],
  [1], [0, 0], [8, 16], [1, 2, 3], ["a"], [None, []], {}, {"a": 1},
  {"height": 8}, {"height": 8, "width": 16}, {"rope_type": "yarn"},
  {"shortest_edge": math.nan}, DEEP,
)  # fmt: skip
ROPE = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
YARN = {
  "type": "yarn",
  "factor": 4.0,
  "original_max_position_embeddings": 16,
  "beta_fast": 32,
  "beta_slow": 1,
  "mscale": 1.0,
  "mscale_all_dim": 0.5,
  "attention_factor": None,
  "truncate": False,
}
HF = {
  "size": 32,
  "crop_size": 32,
  "do_center_crop": True,
  "do_resize": True,
  "do_rescale": True,
  "do_normalize": True,
  "default_to_square": False,
  "rescale_factor": 1 / 255,
  "resample": 3,
  "image_mean": [0.5] * 3,
  "image_std": [0.5] * 3,
  "image_processor_type": "CLIPImageProcessor",
  "do_pad": False,
}
TIMM = {
  "input_size": [3, 32, 32],
  "mean": [0.5] * 3,
  "std": [0.5] * 3,
  "interpolation": "bicubic",
  "crop_pct": 0.9,
  "crop_mode": "center",
}


def follow(read, whole):
  """Reads, or raises the one error, with a message of moderate length."""
  try:
    read(whole)
  except interop.ConfigError as error:
    assert len(str(error)) < 2000
    return False
  return True


def strange(whole):
  """The object with each value in turn replaced by each strange one."""
  for key, value in whole.items():
    for other in STRANGE:
      yield {**whole, key: other}
    if isinstance(value, dict):
      for part in strange(value):
        yield {**whole, key: part}


def check(read, whole):
  """Some changed objects are followed, more are refused."""
  assert follow(read, whole)
  found = [follow(read, changed) for changed in strange(whole)]
  assert 0 < sum(found) < len(found) / 2


def vision(layout):
  """config.json of a class, with every key that is read."""
  whole = {
    **layout.family.defaults,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "projection_dim": 8,
    "id2label": {"0": "a", "1": "b"},
    "pooler_output_size": 8,
    "pooler_act": "tanh",
    "quantization_config": None,
  }
  if not layout.written:
    return {"vision_config": whole, "projection_dim": 8}
  return whole


def language(layout, rope):
  """config.json of a class, with every key that is read."""
  whole = {
    **QWEN,
    **layout.family.defaults,
    **{key: QWEN[key] for key in ("num_key_value_heads", "rope_theta")},
    "head_dim": 8,
    "rope_scaling": rope,
    "layer_types": None,
    "use_sliding_window": True,
    "sliding_window": 4,
    "max_window_layers": 1,
    "quantization_config": None,
  }
  if layout.prefixes[0] != "model.":
    return {"text_config": whole, "tie_word_embeddings": True}
  return whole


def timm():
  """config.json of timm, with every key that is read."""
  args = {**DEFAULTS, **dict.fromkeys(NEEDED, 32), "patch_size": 8}
  return {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 5,
    "global_pool": "token",
    "model_args": args,
    "pretrained_cfg": TIMM,
  }


def main():
  """All files; prints how many."""
  for layout in VISION.values():
    names = [f"{p}pooler.dense.weight" for p in layout.prefixes]
    check(lambda w, to=layout, n=names: to.read(w, n), vision(layout))
  for layout in LANGUAGE.values():
    for rope in (ROPE, YARN):
      check(layout.read, language(layout, rope))
  check(lambda w: Timm().read(w, ()), timm())
  check(from_hf, HF)
  check(from_timm, TIMM)
  print("all are followed or refused")


if __name__ == "__main__":
  main()
