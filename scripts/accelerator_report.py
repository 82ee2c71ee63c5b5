"""Measures everything on the accelerator of this machine, in limited time.

    python scripts/accelerator_report.py --out DIR [--minutes 8]
      [--stages a,b] [--commit HASH] [--list]

Needs JAX for the accelerator, flax, numpy and jaxtyping, and runs from a
checkout or a copy of one, from anywhere. Stages run in order of value, each in
a process of its own with a share of the time that is left; if one fails or
hangs, the others go on. `DIR/report.json` and `DIR/report.md` are written anew
after every row, so that a run that is cut off leaves what it has measured;
`DIR/log.txt` is what the processes wrote. Without an accelerator everything
runs at tiny sizes, to see that the command works.

The exit status is 1 if a check of correctness found a wrong result.
"""

import argparse
import concurrent.futures
import os
import pathlib
import signal
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.report import facts, stages, supervise  # noqa: E402
from scripts.report.budget import Budget  # noqa: E402
from scripts.report.results import Results  # noqa: E402


def main() -> int:
  """Runs the stages and prints the report."""
  args = parse()
  try:
    chosen = stages.chosen(args.stages)
  except ValueError as error:
    return refuse(error)
  if args.list:
    for stage in chosen:
      print(f"{stage.letter}  {stage.name:16}  {stage.about}")
    return 0
  if args.out is None:
    return refuse("--out DIR: must be given")
  if not args.minutes > 0:
    return refuse(f"--minutes {args.minutes}: must be more than 0")
  folder = args.out.resolve()
  budget = Budget(args.minutes)
  try:
    known = {**supervise.SETTINGS, **facts.collect(ROOT, args.commit)}
    results = Results(folder, known, chosen)
    (folder / "log.txt").write_text("")
  except OSError as error:
    return refuse(f"--out {args.out}: {error.strerror}")
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
  run(chosen, budget, results, folder)
  print(results.text())
  print(f"{folder}/report.md, report.json, log.txt")
  return 1 if results.wrong_results() else 0


def parse() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0],
    epilog=f"stages: {', '.join(stages.LETTERS)}; --list says what they are",
  )
  parser.add_argument("--out", type=pathlib.Path, help="folder of the report")
  parser.add_argument(
    "--minutes", type=float, default=8.0, help="of all stages together"
  )
  parser.add_argument(
    "--stages", default=",".join(stages.LETTERS), help="such as a,c"
  )
  parser.add_argument(
    "--commit", help="of this code, where it is not a git checkout"
  )
  parser.add_argument("--list", action="store_true", help="show the stages")
  return parser.parse_args()


def refuse(reason: object) -> int:
  """Says why nothing is done."""
  print(f"error: {reason}", file=sys.stderr)
  return 2


def stop(number: int, frame: object) -> None:
  """Ends at once; what was measured is on disk."""
  del frame
  supervise.end_all()
  os._exit(128 + number)


def run(
  chosen: tuple[stages.Stage, ...],
  budget: Budget,
  results: Results,
  folder: pathlib.Path,
) -> None:
  """Runs groups of stages one after the other."""
  groups = stages.groups(chosen)
  while groups:
    seconds = budget.share(groups)
    group = groups.pop(0)
    one = lambda stage, limit=seconds: run_stage(stage, limit, results, folder)
    with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
      list(pool.map(one, group))


def run_stage(
  stage: stages.Stage, seconds: float, results: Results, folder: pathlib.Path
) -> None:
  """Runs one stage, and says on one line how it went."""
  began = time.monotonic()
  keep = lambda row: results.add(stage, row)
  outcome = supervise.run(stage, seconds, results.wrong(), keep, folder)
  spent = time.monotonic() - began
  results.end(stage, outcome.status, spent, outcome.device)
  print(
    f"{stage.letter}  {stage.name:16}  {spent:.0f} of {seconds:.0f} s"
    f"  {outcome.status}",
    flush=True,
  )


if __name__ == "__main__":
  sys.exit(main())
