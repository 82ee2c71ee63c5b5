"""Stage e: a vision transformer with ToMe, and decoding in a layer of Llama."""

import dataclasses
import functools

import jax

from bench import clock
from scripts import bench_decode, bench_prefill, bench_vit
from scripts.report.jobs import Here, Job
from tokjax.models import ViTConfig

BATCH, MERGED = 64, 13
CONTEXTS = (32768, 131072 - bench_decode.DECODE)
TEXTS = 8
# All that is remembered, then ways to remember or read less.
METHODS = ("full", "snapkv", "streaming_llm", "quest", "kivi")
# Candidates of `bench_vit`, and what the report calls them.
VITS = {
  "ours": "dense", "ours_tome": f"ToMe r={MERGED}", "stock": "Flax layers"
}  # fmt: skip

_TINY_VIT = ViTConfig(image_size=32, width=32, depth=2, heads=2, mlp_dim=64)
_TINY_LAYER = dataclasses.replace(
  bench_prefill.CONFIG, width=64, heads=4, kv_heads=2, head_dim=16, mlp_dim=64
)


def jobs(here: Here) -> list[Job]:
  """Unreduced forms first: others are compared with them."""
  found = [
    Job(_vit(name), functools.partial(_classify, here, name))
    for name in list(VITS)[: 2 if here.tiny else 3]
  ]
  contexts = (1024,) if here.tiny else CONTEXTS
  for context in contexts:
    for method in METHODS[: 2 if here.tiny else None]:
      run = functools.partial(_decode, here, method, context)
      found.append(Job(_step(method, context), run))
  return found


def _vit(name: str) -> str:
  return f"ViT-B/16 {VITS[name]}"


def _classify(here: Here, name: str):
  """A batch of images in bfloat16."""
  batch, r, config = BATCH, MERGED, ViTConfig()
  if here.tiny:
    batch, r, config = 2, 1, _TINY_VIT
  forward, *inputs = bench_vit.forward_of(name, batch, r, config, "bfloat16")
  lowered = forward.lower(*inputs)
  # As it is written: the compiler's own kernels hide their products.
  flops = (lowered.cost_analysis() or {}).get("flops")
  compiled = lowered.compile()
  fields = here.timed(clock.Call(lambda: compiled(*inputs)))
  if flops:
    fields["flops"] = flops
  rate = batch / fields["seconds"]
  return fields | {"images/s": round(rate), "against": _vit("ours")}


def _step(method: str, context: int) -> str:
  return f"Llama layer {method} {context}"


class _Steps:
  """Decode steps one after the other: each takes the state of the last."""

  def __init__(self, step, going):
    self._step, self._going = step, going

  def run(self):
    self._going = self._step(self._going)
    return self._going

  wait = staticmethod(jax.block_until_ready)


def _decode(here: Here, method: str, context: int):
  """A step of several texts in a layer of Llama 3.2 1B's shape."""
  config = _TINY_LAYER if here.tiny else bench_prefill.CONFIG
  texts = 1 if here.tiny else TEXTS
  _, step, going, size = bench_decode.program(
    method, context, config, texts, "bfloat16"
  )
  fields = here.timed(_Steps(step, going))
  return fields | {
    "cache MiB": round(size / 2**20, 1), "against": _step("full", context)
  }  # fmt: skip
