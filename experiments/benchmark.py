"""Block-sparse attention compared with dense attention, on this machine.

python -m experiments.benchmark --config configs/bench/block_sparse.py \
    --workdir DIR

Times every size, density and direction, with the kernels it is compared with
in turns, so that a busy machine hits all alike; the fastest round counts.
Planning (estimate, selection, lists) is timed together with attention
("planned") and alone. Writes `benchmark.json` and `benchmark.png` into the
workdir and prints a table.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
from typing import Any, Literal

import jax.numpy as jnp

from bench import candidates, clock, files, flex, limits
from bench.candidates import Candidate, Unavailable
from experiments import typed
from experiments.bench import report
from experiments.sweeps.count import Count
from tokjax.attention import estimators

ESTIMATORS = tuple(
  name for name in estimators.__all__ if name not in ("Blocked", "share")
)
OPPONENTS = (*candidates.DENSE, "splash", "flex")


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """What is timed: all combinations of lengths, head sizes and batches.

  Attributes:
    lengths, head_sizes, batches: tokens, features of a head, and examples.
    dtype: of queries, keys and values.
    densities: shares of key blocks that each query block lists.
    directions: "forward", "backward" (alone, without the forward pass).
    heads, key_heads: of queries and of keys; the latter divides the former.
    block: tokens in a block of queries and of keys.
    estimator, estimator_options: see `tokjax.attention.estimators`.
    implementation: of the kernel; None: by platform.
    opponents: of "dense" (JAX's own; cuDNN on a GPU), "einsum", "splash" (on
      TPU) and "flex" (PyTorch's). What cannot run is listed with the reason.
    flex_on_cpu: whether FlexAttention may be compiled for a CPU.
    max_gib: memory that a dense program may take in addition to its inputs.
    rounds, seconds: how often everything is timed, and how long at least.
  """

  lengths: tuple[int, ...]
  densities: tuple[float, ...]
  head_sizes: tuple[int, ...] = (128,)
  batches: tuple[int, ...] = (1,)
  directions: tuple[Literal["forward", "backward"], ...] = (
    "forward", "backward",
  )  # fmt: skip
  heads: int = 8
  key_heads: int = 8
  block: int = 128
  dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
  estimator: str = "mean_pooled"
  estimator_options: dict[str, Any] = ()
  implementation: str | None = None
  opponents: tuple[str, ...] = OPPONENTS
  flex_on_cpu: bool = False
  max_gib: float = 16.0
  rounds: int = 5
  seconds: float = 0.1

  def __post_init__(self):
    if self.heads % self.key_heads:
      raise ValueError(
        f"key_heads={self.key_heads}: must divide heads={self.heads}"
      )
    if self.estimator not in ESTIMATORS:
      raise ValueError(
        f"estimator={self.estimator!r}: must be one of {ESTIMATORS}"
      )
    for name in self.opponents:
      if name not in OPPONENTS:
        raise ValueError(f"opponents: {name!r} is none of {OPPONENTS}")
    for density in self.densities:
      if not 0 < density <= 1:
        raise ValueError(f"densities: {density} is not in (0, 1]")


def load(config: Any) -> Benchmark:
  """A `Benchmark` from a ConfigDict or mapping; see `typed.build`."""
  if isinstance(config, Benchmark):
    return config
  if hasattr(config, "to_dict"):
    config = config.to_dict()
  return typed.build(Benchmark, config)


def main(config: Any, workdir: str | pathlib.Path) -> dict[str, Any]:
  """Runs the benchmark; returns what `benchmark.json` holds."""
  config, workdir = load(config), pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  machine = limits.measure(jnp.dtype(config.dtype))
  result = {
    "config": typed.to_dict(config),
    "machine": dataclasses.asdict(machine),
    "rows": [],
    "unavailable": [],
  }
  groups = list(
    itertools.product(
      config.batches, config.lengths, config.head_sizes, config.directions
    )
  )
  with Count(len(groups), "groups") as count:
    for group in groups:
      rows, missing = run_group(config, machine, *group)
      result["rows"] += rows
      result["unavailable"] += missing
      save(workdir / "benchmark.json", result)
      batch, length, head_size, direction = group
      count.step(f"{direction}, batch {batch}, {length} x {head_size}")
  result["machine_after"] = dataclasses.asdict(
    limits.measure(jnp.dtype(config.dtype))
  )
  save(workdir / "benchmark.json", result)
  finish(result, machine, workdir)
  return result


def finish(result, machine: limits.Machine, workdir: pathlib.Path) -> None:
  """Plot and table."""
  title = (
    f"Block-sparse attention, {result['config']['dtype']}, {machine.device}:"
    f" {machine.matmul / 1e12:.3g} TFLOP/s in products,"
    f" {machine.bandwidth / 1e9:.3g} GB/s"
  )
  report.draw(
    result["rows"], workdir / "benchmark.png", title=title, peak=machine.matmul
  )
  print(title)
  report.show(result["rows"])
  for text in dict.fromkeys(
    f"{row['name']}: {row['reason']}" for row in result["unavailable"]
  ):
    print(f"not timed: {text}")
  now = result["machine_after"]["matmul"]
  if not 0.8 < now / machine.matmul < 1.25:
    print(
      f"the machine was not quiet: products ran at {machine.matmul / 1e12:.3g}"
      f" TFLOP/s before and {now / 1e12:.3g} after"
    )
  print(f"{workdir}/benchmark.json, benchmark.png")


def save(path: pathlib.Path, result: dict[str, Any]) -> None:
  """Writes the results so far."""
  files.write(path, json.dumps(result, indent=1) + "\n")


def run_group(
  config: Benchmark,
  machine: limits.Machine,
  batch: int,
  length: int,
  head_size: int,
  direction: str,
) -> tuple[list[dict], list[dict]]:
  """Rows of one size and direction, and what could not be timed."""
  inputs = candidates.random_inputs(config, batch, length, head_size)
  size = limits.Size(
    batch, length, config.heads, config.key_heads, head_size,
    inputs[0].dtype.itemsize,
  )  # fmt: skip
  found, missing = gather(config, inputs, direction)
  where = {**dataclasses.asdict(size), "direction": direction}
  timings = clock.in_turns(found, config.rounds, config.seconds)
  unit = min(
    (min(t) for c, t in zip(found, timings, strict=True) if c.dense),
    default=None,
  )
  rows = [
    {**where, **numbers(candidate, timing, size, direction, machine, unit)}
    for candidate, timing in zip(found, timings, strict=True)
  ]
  return rows, [{**where, **one} for one in missing]


def gather(
  config: Benchmark, inputs, direction: str
) -> tuple[list[Candidate], list[dict[str, str]]]:
  """Everything that can be timed for these inputs, compiled."""
  found, missing = [], []

  def attempt(name, make):
    try:
      found.append(make())
    except Unavailable as reason:
      missing.append({"name": name, "reason": str(reason)})

  length, max_bytes = inputs[0].shape[1], config.max_gib * 2**30
  for name in candidates.DENSE:
    if name in config.opponents:
      make = functools.partial(
        candidates.dense, name, inputs, direction, max_bytes
      )
      attempt(name, make)
  if "splash" in config.opponents:
    attempt(
      "splash", lambda: candidates.splash(inputs, direction, config.block)
    )
  for density in config.densities:
    slot = candidates.slot_of(config, length, density)
    found += candidates.sparse(slot, inputs, direction)
    if "flex" in config.opponents:
      layout = slot.layout(*(jnp.swapaxes(x, 1, 2) for x in inputs[:2]))
      make = functools.partial(
        flex.candidate, layout, inputs, direction, config.flex_on_cpu
      )
      attempt("flex", make)
  return found, missing


def numbers(
  candidate: Candidate,
  timing: list[float],
  size: limits.Size,
  direction: str,
  machine: limits.Machine,
  unit: float | None,
) -> dict[str, Any]:
  """The measured part of a row; a plan alone has no FLOPs of attention."""
  best = min(timing)
  attends = candidate.name != "plan"
  flops = size.flops(candidate.density, direction)
  limit = size.limit(machine, candidate.density, direction)
  return {
    "name": candidate.name,
    "density": candidate.density,
    "seconds": best,
    "median_seconds": statistics.median(timing),
    "tflops": flops / best / 1e12 if attends else None,
    "peak_share": flops / best / machine.matmul if attends else None,
    "limit_share": limit / best if attends else None,
    "speedup": unit / best if attends and unit else None,
  }


if __name__ == "__main__":
  from experiments import launch
  from experiments.command import Command

  launch.start(
    Command(__doc__ or "", (launch.workdir(), *launch.COMMON), (Benchmark,)),
    lambda given: main(given.config, given.workdir),
  )
