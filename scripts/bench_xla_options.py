"""XLA's options for CPUs, one by one, on what this project spends its time in.

    python -m scripts.bench_xla_options [--rounds 3] [--only rows,vit]
      [--options "oneDNN,one thread"] [--keep FILE]

Every option is a process of its own (XLA reads them once), which times each
workload; options take turns, so that a busy machine hits all alike. Prints
milliseconds with XLA's defaults, and of every option how many times as fast it
is as the defaults in the same round (medians over rounds). An option that this
XLA does not know, or that fails, says so. A round of everything takes minutes;
with `--keep` several calls add their rounds to a file, and each prints all.

*   rows: one and eight rows times 60 matrices of 576 x 1536, as in decoding
    SmolLM2, float32 and bfloat16; weights are arguments.
*   square: a product of 2048 x 2048.
*   vit: a plain ViT-S/16, a batch of eight images.
*   sparse: block-sparse attention, 4096 tokens, 8 heads of 128, 2 and 8 of 32
    blocks.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import numpy as jnp

from pallas_kernels import block_sparse_attention
from pallas_kernels import layout as layouts
from tokjax.models import ViT, ViTConfig

OPTIONS = {
  "default": "",
  "one thread": "--xla_cpu_multi_thread_eigen=false",
  "no XNNPACK": "--xla_cpu_use_xnnpack=false",
  "XNNPACK": "--xla_cpu_use_xnnpack=true",
  "XNNPACK for products": "--xla_cpu_experimental_xnn_fusion_type="
  "LIBRARY_FUSION_TYPE_DOT",
  "YNNPACK for products": "--xla_cpu_experimental_ynn_fusion_type="
  "LIBRARY_FUSION_TYPE_DOT",
  "YNNPACK for sums only": "--xla_cpu_experimental_ynn_fusion_type="
  "LIBRARY_FUSION_TYPE_REDUCE",
  "oneDNN": "--xla_cpu_use_onednn=true",
  "oneDNN for products": "--xla_cpu_experimental_onednn_fusion_type="
  "LIBRARY_FUSION_TYPE_DOT",
  "oneDNN calls": "--xla_cpu_experimental_onednn_custom_call=true",
  "loose products": "--xla_cpu_strict_dot_conv_math=false",
  "fast math": "--xla_cpu_enable_fast_math=true",
  "vectors of 512": "--xla_cpu_prefer_vector_width=512",
  "old emitters": "--xla_cpu_use_fusion_emitters=false",
  "concurrent": "--xla_cpu_enable_concurrency_optimized_scheduler=true",
}
Call = Callable[[], Any]
# By option: milliseconds of each workload, or why there are none.
Round = dict[str, Any]


def rows() -> dict[str, Call]:
  """Products of few rows with many matrices."""
  out = {}
  for dtype in ("float32", "bfloat16"):
    keys = jax.random.split(jax.random.key(0), 60)
    weights = [jax.random.normal(k, (576, 1536), dtype) for k in keys]
    for count in (1, 8):
      x = jnp.ones((count, 576), dtype)
      run = jax.jit(lambda x, weights: [x @ weight for weight in weights])
      out[f"rows {count} {dtype}"] = _call(run, x, weights)
  return out


def square() -> dict[str, Call]:
  """A product that the processor's arithmetic bounds."""
  x = jax.random.normal(jax.random.key(0), (2048, 2048))
  return {"square": _call(jax.jit(lambda x: x @ x), x)}


def vit() -> dict[str, Call]:
  """A plain vision transformer."""
  model = ViT(ViTConfig(width=384, heads=6, mlp_dim=1536, depth=12))
  images = jax.random.normal(jax.random.key(0), (8, 224, 224, 3))
  params = jax.jit(model.init)(jax.random.key(1), images)
  return {"vit": _call(jax.jit(model.apply), params, images)}


def sparse() -> dict[str, Call]:
  """Block-sparse attention over lists of blocks."""
  shape, out = (1, 4096, 8, 128), {}
  q, k, v = jax.random.normal(jax.random.key(0), (3, *shape))
  scores = jax.random.normal(jax.random.key(1), (1, 8, 32, 32))
  for listed in (2, 8):
    layout = layouts.from_scores(
      scores, layouts.TopK(listed), q_len=4096, k_len=4096, block_q=128,
      block_k=128,
    )  # fmt: skip
    run = jax.jit(
      lambda q, k, v, layout: block_sparse_attention(
        q, k, v, layout, implementation="xla"
      )
    )
    out[f"sparse {listed} of 32"] = _call(run, q, k, v, layout)
  return out


WORKLOADS = {"rows": rows, "square": square, "vit": vit, "sparse": sparse}


def _call(run: Callable[..., Any], *inputs: Any) -> Call:
  return lambda: jax.block_until_ready(run(*inputs))


def measured(names: list[str], repeats: int = 7) -> dict[str, float]:
  """Milliseconds of each workload, the best of a few."""
  found = {}
  for name in names:
    for label, call in WORKLOADS[name]().items():
      call()
      times = []
      for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
      found[label] = 1000 * min(times)
  return found


def in_process(option: str, names: list[str]) -> dict[str, float] | str:
  """`measured` with an option, or why there is nothing."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} {option}".strip()
  environment: Mapping[str, str] = {
    **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags,
    "JAX_COMPILATION_CACHE_DIR": "",
  }  # fmt: skip
  command = [sys.executable, "-m", "scripts.bench_xla_options"]
  done = subprocess.run(
    [*command, "--one", "--only", ",".join(names)],
    env=environment, capture_output=True, text=True,
  )  # fmt: skip
  if done.returncode:
    said = done.stderr.strip().splitlines()
    return said[-1][:60] if said else f"exit code {done.returncode}"
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  """Runs a process for each option in turn, and prints a table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--only", default=",".join(WORKLOADS))
  parser.add_argument("--options", default=",".join(OPTIONS))
  parser.add_argument("--keep", type=pathlib.Path, help="file of the rounds")
  parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
  given = parser.parse_args()
  names, options = given.only.split(","), given.options.split(",")
  for flag, found, known in (
    ("--only", names, WORKLOADS), ("--options", options, OPTIONS)
  ):  # fmt: skip
    if unknown := set(found) - set(known):
      parser.error(f"{flag} {min(unknown)}: one of {', '.join(known)}")
  if given.one:
    print(json.dumps(measured(names)))
    return
  kept: list[Round] = []
  if given.keep and given.keep.exists():
    kept = json.loads(given.keep.read_text())
  for _ in range(given.rounds):
    kept.append({})
    for name in dict.fromkeys(["default", *options]):
      kept[-1][name] = found = in_process(OPTIONS[name], names)
      if name == "default" and isinstance(found, str):
        sys.exit(f"error: {found}")
      if given.keep:
        given.keep.write_text(json.dumps(kept))
      print(f"round {len(kept)}: {name}", file=sys.stderr, flush=True)
  show(kept)


def show(rounds: list[Round]) -> None:
  """A table in Markdown."""
  tried = dict.fromkeys(name for one in rounds for name in one)
  labels = dict.fromkeys(x for one in rounds for x in one["default"])
  print("| option |", " | ".join(labels), "|")
  print("| --- |" + " ---: |" * len(labels))
  for name in tried:
    runs = [(one["default"], one[name]) for one in rounds if name in one]
    if failed := [own for _, own in runs if isinstance(own, str)]:
      print(f"| {name} | {failed[0]} |" + " |" * (len(labels) - 1))
      continue
    print(f"| {name} |", " | ".join(_cell(name, x, runs) for x in labels), "|")


def _cell(name: str, label: str, runs: list[tuple[Any, Any]]) -> str:
  """Milliseconds of the defaults, how many times as fast an option is."""
  pairs = [(one[label], own[label]) for one, own in runs if label in own]
  if not pairs:
    return ""
  if name == "default":
    return f"{statistics.median(own for _, own in pairs):.1f} ms"
  return f"{statistics.median(one / own for one, own in pairs):.2f}"


if __name__ == "__main__":
  main()
