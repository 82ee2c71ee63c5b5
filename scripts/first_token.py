"""Seconds from the start of a process to the first text of a model.

    python -m scripts.first_token [--model smollm2] [--rounds 3]

Runs `experiments.generate` in fresh processes, as a user does, and notes when
the first characters of the answer arrive: interpreter, imports, weights,
programs and the prompt are all in it. One process goes ahead and fills JAX's
compilation cache; then, in turns, processes find their programs there, and
others are given no cache and compile them. Prints medians and all times.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping

PROMPT = "The capital of France is"
CACHE = "JAX_COMPILATION_CACHE_DIR"


def seconds(model: str, environment: Mapping[str, str]) -> float:
  """From the start of a process to the first byte on its standard output.

  Raises:
    SystemExit: it ended without one; says what it wrote.
  """
  command = [
    sys.executable, "-m", "experiments.generate", "--model", model,
    "--prompt", PROMPT, "--config.tokens=4",
  ]  # fmt: skip
  began = time.perf_counter()
  with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
  ) as process:
    first = process.stdout.read(1)
    spent = time.perf_counter() - began
    _, said = process.communicate()
  if not first or process.returncode:
    sys.exit(said.decode().strip() or "error: no text came")
  return spent


def main() -> None:
  """Runs processes in turns and prints their times."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--model", default="smollm2", help="of `tokjax models`")
  parser.add_argument("--rounds", type=int, default=3)
  given = parser.parse_args()
  if given.rounds < 1:
    parser.error(f"--rounds {given.rounds}: must be 1 or more")
  kept = {k: v for k, v in os.environ.items() if k != CACHE}
  cases = {"programs kept": kept, "compiled anew": {**kept, CACHE: ""}}
  seconds(given.model, kept)
  found: dict[str, list[float]] = {name: [] for name in cases}
  for _ in range(given.rounds):
    for name, environment in cases.items():
      found[name].append(seconds(given.model, environment))
  for name, times in found.items():
    each = ", ".join(f"{one:.2f}" for one in times)
    print(f"{name}: {statistics.median(times):.2f} s ({each})")


if __name__ == "__main__":
  main()
