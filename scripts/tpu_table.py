"""How busy the TPU kernels keep the matrix unit, by their static schedules.

    python -m scripts.tpu_table [--out docs/measured/tpu_schedules.md]
      [--generations v5e,v5p,v6e,v7x] [--blocks 128,512]

Compiles every kernel for every generation, next to splash attention at equal
blocks, and reads the instruction bundles of the innermost loop; then compiles
block-sparse attention for up to a million tokens and reads its memory. Needs
libtpu (extra `tpu`) and no TPU; about two minutes for each generation and block
size. Bundles wait for memory on a TPU: the table compares schedules, and is no
measurement. A run that is stopped goes on where it was, if neither the kernels
nor the compiler have changed since.
"""

import argparse
import hashlib
import json
import os
import pathlib
import sys
from importlib import metadata

import jax
import jax.numpy as jnp

from pallas_kernels import aot
from pallas_kernels import layout as layouts
from pallas_kernels.aot import llo, tpu
from scripts import tpu_programs

OUT = "docs/measured/tpu_schedules.md"
# Kernels, and those of splash attention that do the same.
ATTENTION = {
  "block_sparse_attention_forward.1": "splash_mha_fwd_residuals.1",
  "block_sparse_attention_d_q.1": "splash_mha_dq_no_residuals.1",
  "block_sparse_attention_d_kv.1": "splash_mha_dkv_no_residuals.1",
}
OTHERS = (
  "attention_mass_columns.1",
  "attention_mass_blocks.1",
  "attention_mass_d_q.1",
  "attention_mass_d_k.1",
  "decode_attention.1",
  "linear_attention_forward.1",
  "linear_attention_backward.1",
)
# Tokens, block size and blocks that a row lists.
LONG = ((131072, 128, 102), (1048576, 128, 64), (1048576, 512, 64))

_PAGE = """# Static schedules of the TPU kernels

Written by `python -m scripts.tpu_table` (JAX {jax}, libtpu {libtpu}).
**Compiled, not measured**: no TPU ran these programs. Bundles are the
instructions of the innermost loop, from the first to the last use of the matrix
unit; a bundle takes a cycle unless it waits. Matrix unit: share of its slots
that are used. Spills: vector registers stored to make room. Our loop takes
short blocks several at a time, 512 keys a step at most; splash attention takes
one block a step. Head size 128, bfloat16.

{schedules}

## Long lists

Temporaries of the forward and backward pass of one head; where the lists do not
fit the scalar memory, what the compiler said.

| TPU | tokens | block | listed | temporaries |
| --- | ---: | ---: | ---: | --- |
{memory}
"""


def schedules_of(generation: str, block: int) -> dict[str, llo.Loop]:
  """The innermost loop of every kernel, splash attention included."""
  names = [*ATTENTION, *ATTENTION.values()]
  source = "from scripts import tpu_programs as p; p.compile_{}({!r}, {})"
  run = lambda kind, names: llo.schedules(
    source.format(kind, generation, block), names
  )
  found = run("attention", names) | run("others", OTHERS)
  return {name: llo.main_loop(loops) for name, loops in found.items()}


def memory_of(generation: str, length: int, block: int, listed: int) -> str:
  """Temporaries of all gradients at a length, or why there is no program."""
  layout = tpu_programs.lists(length, block, listed, layouts.Causal(),
                              by_key=listed)  # fmt: skip
  q = tpu_programs.shapes(1, length, 1, 128)
  bias = tpu_programs.shapes(1, 1, length, dtype=jnp.float32)
  try:
    compiled = aot.compile_for(
      tpu.device(generation), tpu_programs.gradient, q, q, bias, layout
    )
  except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
    return str(error).splitlines()[0][:200]
  return f"{aot.report(compiled).temporaries / 2**20:.0f} MiB"


def schedule_lines(found: dict[str, dict[str, llo.Loop]]) -> list[str]:
  """Rows of the table of schedules: bundles, share of the unit, spills."""
  lines = [
    "| TPU | block | kernel | bundles | matrix unit | spills | splash:"
    " bundles | matrix unit | spills |",
    "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
  ]
  cells = lambda x: f"{x[1]} | {x[2]:.0%} | {x[3]}"
  for key, kernels in found.items():
    generation, block = key.split()
    for name in (*ATTENTION, *OTHERS):
      stock = ATTENTION.get(name)
      other = cells(kernels[stock]) if stock else "- | - | -"
      lines.append(
        f"| {generation} | {block} | `{name.removesuffix('.1')}` |"
        f" {cells(kernels[name])} | {other} |"
      )
  return lines


def document(found, memory) -> str:
  """The page."""
  rows = (f"| {' | '.join(key.split())} | {text} |"
          for key, text in memory.items())  # fmt: skip
  return _PAGE.format(
    jax=jax.__version__,
    libtpu=metadata.version("libtpu"),
    schedules="\n".join(schedule_lines(found)),
    memory="\n".join(rows),
  )


def fingerprint() -> str:
  """Of everything that a schedule depends on: kernels, programs, compilers."""
  root = pathlib.Path(__file__).resolve().parent.parent
  files = [*sorted((root / "pallas_kernels").rglob("*.py")),
           pathlib.Path(tpu_programs.__file__)]  # fmt: skip
  found = hashlib.sha256(b"".join(file.read_bytes() for file in files))
  return f"{jax.__version__} {metadata.version('libtpu')} {found.hexdigest()}"


def unfinished(kept: pathlib.Path) -> dict:
  """What a stopped run has found, or nothing if it was of other kernels."""
  new = {"of": fingerprint(), "schedules": {}, "memory": {}}
  found = json.loads(kept.read_text()) if kept.exists() else new
  return found if found.get("of") == new["of"] else new


def main(args: argparse.Namespace) -> None:
  """Compiles what is missing, then writes the page."""
  jax.config.update("jax_platforms", "cpu")
  kept = pathlib.Path(f"{args.out}.json")
  state = unfinished(kept)

  def save(part, key, value):
    state[part][key] = value
    new = kept.with_suffix(".new")
    new.write_text(json.dumps(state))
    os.replace(new, kept)
    print(key, flush=True)

  for generation in args.generations.split(","):
    for block in map(int, args.blocks.split(",")):
      if (key := f"{generation} {block}") not in state["schedules"]:
        save("schedules", key, schedules_of(generation, block))
    for sizes in LONG:
      key = " ".join(map(str, (generation, *sizes)))
      if key not in state["memory"]:
        save("memory", key, memory_of(generation, *sizes))
  pathlib.Path(args.out).write_text(
    document(state["schedules"], state["memory"])
  )
  kept.unlink()


if __name__ == "__main__":
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", default=OUT)
  parser.add_argument("--generations", default=",".join(tpu.TOPOLOGIES))
  parser.add_argument("--blocks", default="128,512")
  given = parser.parse_args()
  if reason := tpu.missing():
    sys.exit(f"error: {reason}")
  for name in given.generations.split(","):
    if name not in tpu.TOPOLOGIES:
      sys.exit(
        f"error: --generations={name!r}: must be of {', '.join(tpu.TOPOLOGIES)}"
      )
  sizes = given.blocks.split(",")
  if not all(x.isdecimal() and int(x) and int(x) % 128 == 0 for x in sizes):
    sys.exit(f"error: --blocks={given.blocks}: must be multiples of 128")
  main(given)
