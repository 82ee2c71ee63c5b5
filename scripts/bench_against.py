"""Side by side: transformers, kvpress and this project on one real model.

    python scripts/bench_against.py --out DIR [--checkpoint smollm2]
      [--lengths 512,2048,8192] [--batches 1,4] [--steps 32] [--rounds 3]
      [--systems transformers,tokjax] [--precision float32] [--keep 0.25]
      [--python /another/environment/bin/python]

Prefill, time to the first token, seconds a token of decoding, peak memory and
kept entries. Every measurement is a process of its own, which loads the model,
makes one pass to warm up and measures the second. Systems take turns within
each round; a number is the median over rounds, a ratio the median over the
rounds' ratios. transformers and kvpress run under `--python`, by default this
one (kvpress 0.5 needs transformers below 5.3, so it has an environment of its
own); what is not installed is skipped, and the reason printed. Writes
`against.json` and `against.md`; a run that is stopped goes on where it was.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
if str(ROOT) not in sys.path:
  sys.path.insert(0, str(ROOT))

from scripts.against.case import Case  # noqa: E402
from scripts.against.systems import OWN, SYSTEMS, Skip, measure  # noqa: E402

# Ratios above 1 are better: the column, the system, what it is compared with.
GOALS = (
  ("prefill", "tokjax", "transformers", 1.2, None),
  ("decode", "tokjax", "transformers", 2.0, None),
  ("decode", "tokjax snapkv", "tokjax", 2.0, 8192),
)
MEASURED = ("load", "cold", "prefill", "first", "decode", "peak", "kept")
Row = dict[str, Any]


def run(case: Case, python: str, seconds: float) -> Row:
  """A measurement in a process of its own; "skipped" says why there is none."""
  python = python if case.system in OWN else sys.executable
  command = [python, __file__, "--one", json.dumps(dataclasses.asdict(case))]
  try:
    done = subprocess.run(
      command, capture_output=True, text=True, timeout=seconds,
      env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
  except (OSError, subprocess.TimeoutExpired) as error:
    return {"skipped": str(error)}
  lines = done.stdout.strip().splitlines()
  if done.returncode or not lines:
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return {"skipped": said[-1] if said else f"exit code {done.returncode}"}
  return json.loads(lines[-1])


def one(text: str) -> None:
  """What the process of a measurement does; the last line is the result."""
  try:
    found = measure(Case(**json.loads(text)))
  except (ImportError, Skip) as error:
    found = {"skipped": str(error)}
  print(json.dumps(found))


def medians(rows: Sequence[Row]) -> list[Row]:
  """A row for each case, over rounds, with ratios to the reference systems."""
  cases: dict[tuple, dict[str, dict[int, Row]]] = {}
  for row in rows:
    key = (row["length"], row["batch"])
    by_system = cases.setdefault(key, {}).setdefault(row["system"], {})
    by_system[row["round"]] = row
  out = []
  for (length, batch), systems in cases.items():
    for system, by_round in systems.items():
      done = [row for row in by_round.values() if "skipped" not in row]
      if not done:
        reason = next(iter(by_round.values()))["skipped"]
        out.append(
          {"system": system, "length": length, "batch": batch,
           "skipped": reason}
        )  # fmt: skip
        continue
      row = {"system": system, "length": length, "batch": batch,
             "rounds": len(done)}  # fmt: skip
      for name in MEASURED:
        values = [r[name] for r in done if r[name] is not None]
        row[name] = statistics.median(values) if values else None
      for other in ("transformers", "tokjax"):
        for name in ("prefill", "decode"):
          ratios = ratios_of(by_round, systems.get(other, {}), name)
          if ratios:
            row[f"{name} / {other}"] = statistics.median(ratios)
      out.append(row)
  return out


def ratios_of(own: dict[int, Row], other: dict[int, Row], name: str):
  """How many times faster than the other system, round by round."""
  return [
    other[i][name] / row[name]
    for i, row in own.items()
    if name in row and name in other.get(i, {})
  ]


def markdown(rows: Sequence[Row]) -> str:
  """A table, what was skipped, and which goals are met."""
  head = (
    "tokens", "batch", "system", "prefill s", "first token s", "ms a token",
    "peak MiB", "kept", "prefill", "decode", "cold s",
  )  # fmt: skip
  lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
  skipped = []
  for row in rows:
    where = f"{row['system']} at {row['length']} tokens, batch {row['batch']}"
    if "skipped" in row:
      skipped.append(f"- {where}: skipped, {row['skipped']}")
      continue
    peak = "-" if row["peak"] is None else f"{row['peak']:.0f}"
    cells = (
      row["length"], row["batch"], row["system"], f"{row['prefill']:.2f}",
      f"{row['first']:.2f}", f"{1e3 * row['decode']:.1f}", peak,
      f"{row['kept']:.0f}", times(row.get("prefill / transformers")),
      times(row.get("decode / transformers")), f"{row['cold']:.1f}",
    )  # fmt: skip
    lines.append("| " + " | ".join(map(str, cells)) + " |")
  lines += [
    "", "prefill, decode: times faster than transformers. peak: resident,"
    " weights included. kept: entries of a key head. cold: from the loaded"
    " model to the first token, compilation included.", "",
  ]  # fmt: skip
  return "\n".join([*lines, *goals(rows), *skipped]) + "\n"


def times(ratio: float | None) -> str:
  """A cell of the table."""
  return "-" if ratio is None else f"{ratio:.2f}x"


def goals(rows: Sequence[Row]) -> list[str]:
  """A line for each goal and case."""
  lines = []
  for name, system, other, least, length in GOALS:
    for row in rows:
      ratio = row.get(f"{name} / {other}")
      right = row["system"] == system and length in (None, row["length"])
      if right and ratio is not None:
        word = "met" if ratio >= least else "MISSED"
        lines.append(
          f"- {word}: {name} of {system} {ratio:.2f}x {other}'s (goal"
          f" {least:g}) at {row['length']} tokens, batch {row['batch']}"
        )
  return [*lines, ""]


def bench(cases: Sequence[Case], rounds: int, python: str, out: pathlib.Path,
          seconds: float = 1800) -> list[Row]:  # fmt: skip
  """Measures all cases in turns; what `out` holds is not measured again."""
  out.mkdir(parents=True, exist_ok=True)
  path = out / "against.json"
  rows = json.loads(path.read_text())["rows"] if path.exists() else []
  # What could not be measured then may be now.
  rows = [row for row in rows if "skipped" not in row]
  known = {
    json.dumps([row["case"], row["round"]], sort_keys=True) for row in rows
  }
  for i in range(rounds):
    for case in cases:
      said = dataclasses.asdict(case)
      if json.dumps([said, i], sort_keys=True) in known:
        continue
      found = run(case, python, seconds)
      row = {"case": said, "round": i, "system": case.system,
             "length": case.length, "batch": case.batch, **found}  # fmt: skip
      shown = {name: x for name, x in row.items() if name != "case"}
      print(json.dumps(shown), flush=True)
      rows.append(row)
      new = path.with_suffix(".new")
      new.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
      os.replace(new, path)
      (out / "against.md").write_text(markdown(medians(rows)))
  return rows


def main() -> None:
  """Reads the command line."""
  numbers = lambda text: [int(part) for part in text.split(",")]
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path)
  parser.add_argument("--checkpoint", default="smollm2")
  parser.add_argument("--lengths", type=numbers, default=[512, 2048, 8192])
  parser.add_argument("--batches", type=numbers, default=[1, 4])
  parser.add_argument("--steps", type=int, default=32)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--keep", type=float, default=0.25)
  parser.add_argument(
    "--precision", choices=("float32", "bfloat16"), default="float32"
  )
  parser.add_argument("--systems", default=",".join(SYSTEMS))
  parser.add_argument("--python", default=sys.executable)
  parser.add_argument("--one", help=argparse.SUPPRESS)
  given = parser.parse_args()
  if given.one:
    return one(given.one)
  if given.out is None:
    parser.error("--out is needed")
  systems = given.systems.split(",")
  if unknown := [name for name in systems if name not in SYSTEMS]:
    parser.error(f"--systems: {unknown[0]!r} must be one of {list(SYSTEMS)}")
  from tokjax import zoo

  checkpoint = zoo.resolve(given.checkpoint)
  cases = [
    Case(system, checkpoint, length, batch, given.steps, given.keep,
         given.precision)  # fmt: skip
    for length in given.lengths
    for batch in given.batches
    for system in systems
  ]
  rows = bench(cases, given.rounds, given.python, given.out)
  print(markdown(medians(rows)))


if __name__ == "__main__":
  main()
