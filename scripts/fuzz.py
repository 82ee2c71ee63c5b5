"""Fuzzing and fault injection with a fixed budget.

python -m scripts.fuzz --minutes 2
python -m scripts.fuzz --minutes 60 --seed 7 --stages kills damage
python -m scripts.fuzz --stages kernels --seed 0 --first 12 --cases 1

Stages take turns; each gets about the same time. A case is made from the seed,
the stage and its number, so that the last form repeats one that failed. The
exit status is 1 if anything was found. `--plant STAGE` puts a known fault into
a stage, to see that it is found.
"""

import argparse
import dataclasses
import os
import sys
import threading
import time
import traceback
import zlib

# Before JAX is imported. Cases compile far longer than they compute.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from absl import logging

from scripts import fuzz_commands, fuzz_runs, fuzz_values

STAGES = {
  **fuzz_runs.STAGES, **fuzz_commands.STAGES, **fuzz_values.STAGES
}  # fmt: skip


@dataclasses.dataclass
class Tally:
  """What a stage has done so far.

  Attributes:
    number: of the next case.
    cases, faults: how many there were.
    seconds: spent, setting up included.
    counts: what the stage counts itself, by name.
  """

  number: int
  cases: int = 0
  faults: int = 0
  seconds: float = 0.0
  counts: dict[str, int] = dataclasses.field(default_factory=dict)

  def row(self, name: str) -> str:
    """For the table at the end."""
    more = ", ".join(f"{k} {v}" for k, v in sorted(self.counts.items()))
    return (
      f"{name:10} {self.cases:6} cases {self.faults:4} faults"
      f" {self.seconds:6.0f} s  {more}"
    )


def run_case(name: str, stage, tally: Tally, seed: int) -> None:
  """One case; a fault is printed with the command that repeats it."""
  number, tally.number = tally.number, tally.number + 1
  rng = np.random.default_rng((seed, zlib.crc32(name.encode()), number))
  try:
    for what in stage.case(rng):
      tally.counts[what] = tally.counts.get(what, 0) + 1
  except Exception:
    tally.faults += 1
    print(
      f"FAULT python -m scripts.fuzz --stages {name} --seed {seed}"
      f" --first {number} --cases 1\n{traceback.format_exc()[-3000:]}",
      flush=True,
    )
  tally.cases += 1


def main(args: argparse.Namespace) -> int:
  """Runs the stages until the budget is spent; returns how many faults."""
  logging.set_verbosity(logging.FATAL)  # Of orbax, about what was harmed.
  print(f"seed {args.seed}, stages {' '.join(args.stages)}", flush=True)
  began = time.monotonic()
  tallies = {name: Tally(args.first) for name in args.stages}
  open_stages = {}
  try:
    while time.monotonic() - began < 60 * args.minutes:
      due = {
        name: tally.seconds
        for name, tally in tallies.items()
        if args.cases is None or tally.cases < args.cases
      }
      if not due:
        break
      name = min(due, key=due.get)
      start = time.monotonic()
      if name not in open_stages:
        open_stages[name] = STAGES[name](planted=name == args.plant)
      run_case(name, open_stages[name], tallies[name], args.seed)
      tallies[name].seconds += time.monotonic() - start
  finally:
    for stage in open_stages.values():
      stage.close()
  for name, tally in tallies.items():
    print(tally.row(name))
  faults = sum(tally.faults for tally in tallies.values())
  idle = [name for name, tally in tallies.items() if not tally.cases]
  if idle:
    print(f"no time for: {' '.join(idle)}")
  print(f"{faults} faults in {time.monotonic() - began:.0f} s")
  return faults


def parse(argv: list[str]) -> argparse.Namespace:
  """The flags."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--minutes", type=float, default=2.0)
  parser.add_argument("--seed", type=int, default=None)
  parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
  parser.add_argument("--first", type=int, default=0, help="number of a case")
  parser.add_argument("--cases", type=int, default=None, help="of each stage")
  parser.add_argument("--plant", choices=STAGES, default=None)
  args = parser.parse_args(argv)
  if args.seed is None:
    args.seed = int(time.time())
  return args


if __name__ == "__main__":
  # Orbax leaves threads and coroutines behind when it cannot read an array.
  sys.unraisablehook = threading.excepthook = lambda *_: None
  sys.exit(bool(main(parse(sys.argv[1:]))))
