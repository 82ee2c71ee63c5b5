"""Every method on one model: what it loses, what it costs, how fast it is.

python -m experiments.sweep --config configs/grid_pareto.py --workdir DIR
python -m experiments.sweep --config configs/kv_pareto.py --workdir DIR

Image classifiers: writes `pareto.json`, `pareto.csv`, `pareto.png` and
`merges.png` into the workdir; language models: `kv_pareto.json`,
`kv_pareto.csv`, `kv_pareto.png` and `recall.png`; dense models: `dense.json`,
`dense.csv`, `dense.png` and `maps.png`; vision-language models:
`vlm_pareto.json`, `vlm_pareto.csv`, `vlm_pareto.png` and `kept.png`. With
several seeds (`--config.subject.seeds=3`) rows are means over models trained
from each. All print a table. Interrupted, a sweep goes on where it was: rows
that are there are kept. Kinds of model are files in `experiments/sweeps`, see
`experiments.sweeps.subject`.
"""

import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import typed
from experiments.sweeps import programs, report
from experiments.sweeps.classification import Classification
from experiments.sweeps.count import Count, Told
from experiments.sweeps.dense import Dense
from experiments.sweeps.language import Language
from experiments.sweeps.questions import Questions
from experiments.sweeps.results import WHOLE, Results, Row, writable
from experiments.sweeps.subject import UNREDUCED, Job, Subject, Sweep, Unfit
from experiments.training import rundir
from experiments.training.eta import working

KINDS: tuple[type[Sweep], ...] = (Classification, Language, Dense, Questions)


def load(config: Any) -> Sweep:
  """A sweep from a ConfigDict or mapping, of the kind that its subject names.

  Raises:
    ConfigError: an unknown subject, or what `typed.build` raises.
  """
  if isinstance(config, Sweep):
    return config
  if hasattr(config, "to_dict"):
    config = config.to_dict()
  return typed.build(kind_of(config), config)


def kind_of(config: Mapping[str, Any]) -> type[Sweep]:
  """The kind of sweep that the subject of a config belongs to.

  Raises:
    ConfigError: an unknown subject.
  """
  subject = config.get("subject")
  name = subject.get("name") if hasattr(subject, "get") else None
  kinds = {name: kind for kind in KINDS for name in kind.SUBJECTS}
  return typed.chosen(kinds, name, "config.subject")


def main(config: Any, workdir: str | pathlib.Path) -> Results:
  """Runs the sweep; everything is written under `workdir`.

  Raises:
    ConfigError: a setting, recipe or workdir that cannot be used, or damaged
      results of an earlier run.
  """
  config = load(config)
  methods, workdir = config.methods(), writable(workdir, "workdir")
  with rundir.locked(workdir):
    return _main(config, methods, workdir)


def _main(
  config: Sweep, methods: Sequence[str], workdir: pathlib.Path
) -> Results:
  """`main` of a checked config, alone in its workdir."""
  began = time.perf_counter()
  results = Results(workdir / f"{config.STEM}.json", config.fingerprint())
  subject = config.prepare(workdir)
  complete(config, subject, methods, results)
  results.write_csv(workdir / f"{config.STEM}.csv")
  names = [f"{config.STEM}.json", f"{config.STEM}.csv"]
  if results.reduced:
    names.append(f"{config.STEM}.png")
    plot = subject.plot(results)
    report.draw(results, plot, workdir / names[-1], subject.origin)
  names.append(config.PICTURE)
  subject.picture(results, methods, workdir / names[-1])
  names = [name for name in names if (workdir / name).exists()]
  report.show(subject.table(results), results.unreachable)
  print(
    f"{time.perf_counter() - began:.0f} s; {workdir}/{names[0]},"
    f" {', '.join(names[1:])}"
  )
  return results


def complete(
  config: Sweep, subject: Subject, methods: Sequence[str], results: Results
) -> None:
  """Makes the rows that are missing, and saves after each round."""
  rounds = todo(config, methods, results)
  first = not results.has(WHOLE, 1.0)
  if not rounds and not first:
    return
  try:
    with working("compiling the unreduced model"):
      whole = subject.compile(UNREDUCED)
  except Unfit as error:
    raise typed.ConfigError(f"the unreduced model: {error.reason}") from error
  with Count(sum(map(len, rounds)) + first, "recipes") as count:
    if first:
      told = count.within(1, "the unreduced model")
      (row,) = rows_of([whole], whole, subject, config.rounds, told)
      results.save([{**row, "keep": 1.0}])
      count.reached(1, "measured the unreduced model")
    done = int(first)
    for jobs in rounds:
      ready, unfit = programs.compile_round(
        subject.compile, jobs, config.threads, count, config.COMPILING
      )
      share = 1 - config.COMPILING
      names = ", ".join(program.job.method for program in ready)
      told = count.within(share * len(ready), f"{names} at {jobs[0].keep}")
      rows = []
      if ready:
        rows = rows_of(ready, whole, subject, config.rounds, told)
      results.save(rows, unfit)
      done += len(jobs)
      said = f"measured {names}" if names else "nothing to measure"
      count.reached(done, f"{said} at {jobs[0].keep}")


def todo(
  config: Sweep, methods: Sequence[str], results: Results
) -> list[list[Job]]:
  """The jobs that are left, in rounds: each of one keep ratio.

  A recipe that no keep ratio changes has one row, at keep 1.
  """
  rounds = []
  for keep in dict.fromkeys((1.0, *config.keeps)):
    jobs = []
    for method in methods:
      job = config.job(method, keep)
      here = keep in config.keeps if job.follows_keep() else keep == 1
      if here and not results.has(method, keep):
        jobs.append(job)
    size = config.TOGETHER or max(len(jobs), 1)
    rounds += [jobs[at : at + size] for at in range(0, len(jobs), size)]
  return rounds


def rows_of(
  made: Sequence[Any], whole: Any, subject: Subject, rounds: int, told: Told
) -> list[Row]:
  """Scores and times programs; a row for each."""
  scores = subject.score(made, whole, told)
  seconds = programs.measure(made, whole, subject.calls, rounds)
  return [
    {
      "method": program.job.method,
      "keep": program.job.keep,
      **score,
      # The unreduced model is compared with itself: 1, whatever the noise.
      **subject.speed(
        {name: both[:, [1, 1]] for name, both in times.items()}
        if program is whole
        else times
      ),
    }
    for program, score, times in zip(made, scores, seconds, strict=True)
  ]


def from_command_line(given: Any) -> None:
  """`main` with the options of the command."""
  rundir.keep_programs()
  main(given.config, given.workdir)


if __name__ == "__main__":
  from experiments import launch
  from experiments.command import Command

  launch.start(
    Command(
      __doc__ or "", (launch.workdir(), *launch.COMMON), KINDS, kind_of
    ),
    from_command_line,
  )
