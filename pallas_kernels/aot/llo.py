"""Static schedules of TPU kernels: how busy the matrix unit is in a loop.

The TPU compiler can dump the final instruction bundles of a kernel, one row of
unit usage each. A bundle takes a cycle unless it waits, so that the bundles of
a loop body, and the share of the matrix unit's slots used in them, can be
compared between kernels without a TPU. They say nothing of copies from memory.
"""

import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

from pallas_kernels.aot import tpu

# Of all passes only the last, or the dump takes longer than the compiler.
_FLAGS = (
  "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true"
  " --xla_jf_dump_llo_pass_label_regex=final.*"
)
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(\w\w)?\s*: (>*)(.*)")


class Loop(NamedTuple):
  """A loop that uses the matrix unit.

  Attributes:
    depth: nesting, 1 for the grid.
    bundles: from the first to the last use of the matrix unit.
    matrix: share of the matrix unit's slots used in them.
    spills: vector registers stored to make room, in them.
  """

  depth: int
  bundles: int
  matrix: float
  spills: int


def schedules(source, kernels):
  """Compiles in a process of its own, and reads the kernels' schedules.

  Args:
    source: Python source that compiles something for TPU.
    kernels: names of the kernels, as the dump spells them ("my_kernel.1").

  Returns:
    `{kernel name: [Loop, ...]}` in program order.

  Raises:
    RuntimeError: if the process fails, with the end of what it wrote, or if
      the dump does not have one of the kernels.
  """
  # The dump holds every pass over every kernel: up to a gigabyte.
  with tempfile.TemporaryDirectory() as directory:
    env = (
      os.environ
      | tpu.environment()
      | {
        "JAX_PLATFORMS": "cpu",
        "LIBTPU_INIT_ARGS": _FLAGS.format(directory),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
      }
    )
    child = subprocess.run(
      [sys.executable, "-c", source],
      env=env,
      capture_output=True,
      text=True,
      check=False,
    )
    if child.returncode:
      raise RuntimeError(f"compilation failed:\n{child.stderr[-2000:]}")
    return {name: _loops(directory, name) for name in kernels}


def main_loop(loops):
  """Of the loops of greatest depth the one with most work for the matrix unit.

  In attention that of full blocks, which comes before that of partial ones.
  """
  depth = max(loop.depth for loop in loops)
  work = lambda loop: round(loop.bundles * loop.matrix, 3)
  return max((x for x in loops if x.depth == depth), key=work)


def _loops(directory, kernel):
  """Loops of one kernel from its bundles and their usage."""
  usage, bundles = (
    _file(directory, kernel, kind)
    for kind in ("final_hlo-static-per-bundle-utilization", "final_bundles")
  )
  units, rows = _usage(usage)
  marks = _marks(bundles)
  if len(marks) != len(rows):
    raise RuntimeError(
      f"{bundles} has {len(marks)} bundles, {usage} {len(rows)} rows"
    )
  matrix, spill = units.index("MXU"), units.index("VSTORE:SPILL")
  capacity = rows.capacity[matrix]
  loops = []
  for start, (mark, depth) in enumerate(marks):
    if mark != "LB":
      continue
    end = start + 1
    while (
      end < len(marks)
      and marks[end][1] >= depth
      and (marks[end] != ("LB", depth))
    ):
      end += 1
    used = [n for n in range(start, end) if rows[n][matrix]]
    if used:
      body = rows[used[0] : used[-1] + 1]
      busy = sum(row[matrix] for row in body)
      loops.append(
        Loop(
          depth,
          len(body),
          busy / capacity / len(body),
          sum(row[spill] for row in body),
        )
      )
  return loops


def _file(directory, kernel, kind):
  """Path of the kernel's dump of one kind."""
  name = re.compile(rf"\d+-{re.escape(kernel)}-\d+-{kind}\.txt")
  found = [x for x in sorted(os.listdir(directory)) if name.fullmatch(x)]
  if not found:
    raise RuntimeError(f"{directory} has no {kind} of {kernel!r}")
  return os.path.join(directory, found[-1])


class _Rows(list):
  """Rows of a usage table, with the units' capacities."""

  capacity = ()


def _usage(path):
  """Names of the units, and one row of counts for each bundle."""
  with open(path) as file:
    lines = [line for line in file.read().splitlines() if line.strip()]
  numbers = lambda line: [int(x) for x in line.split()]
  rows = _Rows(numbers(line) for line in lines[4:])
  rows.capacity = numbers(lines[2])
  return [name.strip() for name in lines[1].split(",")], rows


def _marks(path):
  """Kind ("LB" begins a loop) and loop depth of each bundle."""
  marks = []
  with open(path) as file:
    for line in file:
      match = _BUNDLE.match(line)
      if match:
        kind, depth, rest = match.groups()
        # An empty bundle does not say how deep it is.
        same = marks and rest.strip().startswith("{}")
        marks.append((kind, marks[-1][1] if same else len(depth)))
  return marks
