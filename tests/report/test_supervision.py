"""A stage that fails or hangs keeps what it has measured."""

import json
import os
import subprocess
import sys
import time
import types

import pytest

from scripts import accelerator_report
from scripts.report import stages, supervise
from scripts.report.budget import Budget
from scripts.report.results import Results

ROOT = supervise.ROOT


def stage(function, **options):
  module = f"tests.report.misbehaving:{function}"
  return stages.Stage("a", "misbehaving", "goes wrong", module, **options)


def run(one, folder, seconds=500.0, keep=None):
  """Rows by name and how the stage ended."""
  results = Results(folder, {}, (one,))
  on_disk = folder / "report.json"

  def add(row):
    results.add(one, row)
    assert json.loads(on_disk.read_text())["stages"][0]["rows"][-1] == row
    if keep is not None:
      keep(row)

  outcome = supervise.run(one, seconds, ["raises"], add, folder)
  return {row["name"]: row for row in results.stages[0]["rows"]}, outcome


def test_a_row_that_fails_dies_or_hangs_costs_that_row(tmp_path):
  rows, outcome = run(stage("jobs", row_seconds=1), tmp_path)
  assert outcome.status == "done"
  assert outcome.device["platform"] == "cpu"
  for name in ("first", "after an exception", "after a death", "after a hang"):
    assert rows[name]["seconds"] == 1.0
  assert rows["raises"]["error"] == "ArithmeticError: the result is"
  assert "ArithmeticError" in (tmp_path / "log.txt").read_text()
  assert rows["dies"]["error"] == "the process ended with status 7"
  assert "the limit of one row" in rows["hangs"]["error"]
  skipped = rows["rests on what went wrong"]["skipped"]
  assert skipped == "the check 'raises' went wrong"
  assert not list(tmp_path.glob("*.journal"))


def test_a_stage_whose_time_is_up_keeps_its_rows(tmp_path, monkeypatch):
  """The clock jumps once the first row is there; the second one hangs."""
  late = []
  now = lambda: time.monotonic() + 1000 * len(late)
  clock = types.SimpleNamespace(monotonic=now, sleep=time.sleep)
  monkeypatch.setattr(supervise, "time", clock)
  one = stage("without_end", row_seconds=10**6)
  monkeypatch.setattr(supervise, "_START_SECONDS", 10**6)
  rows, outcome = run(one, tmp_path, keep=late.append)
  assert rows["first"]["seconds"] == 1.0
  assert "rows not begun: the time was up" in outcome.status
  assert "after a hang" not in rows


def test_a_stage_that_does_not_start_says_why(tmp_path):
  rows, outcome = run(stage("does_not_start"), tmp_path)
  assert not rows
  assert "did not start: ImportError: no module named flex" in outcome.status
  _, outcome = run(stage("jobs"), tmp_path, seconds=0.0)
  assert "the stage's time was up" in outcome.status


def test_time_is_shared_by_weight_and_passed_on():
  now = [0.0]
  budget = Budget(1, now=lambda: now[0])
  make = lambda weight: stages.Stage("a", "", "", "", weight=weight)
  groups = [(make(1), make(3)), (make(3),), (make(6),)]
  assert budget.share(groups) == pytest.approx(57 * 3 / 12)
  now[0] = 3.0  # It was done early.
  assert budget.share(groups[1:]) == pytest.approx(54 * 3 / 9)
  now[0] = 56.0
  assert budget.share(groups[2:]) == pytest.approx(1)
  now[0] = 100.0
  assert budget.left() == 0


def test_only_stages_that_check_run_together():
  groups = [[s.name for s in group] for group in stages.groups(stages.STAGES)]
  assert len(groups[0]) == 4
  assert all(len(group) == 1 for group in groups[1:])
  assert [s.letter for s in stages.chosen("b, f")] == ["b", "f"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--out", "{file}/sub"], "error: --out {file}/sub: Not a directory"),
    (["--out", "{file}"], "error: --out {file}: File exists"),
    ([], "error: --out DIR: must be given"),
    (["--out", "x", "--stages", "a,z"], "error: --stages a,z: 'z' is no stage"),
    (["--out", "x", "--minutes", "0"], "error: --minutes 0.0: must be"),
  ],
)
def test_wrong_commands_are_refused_on_one_line(
  arguments, message, tmp_path, monkeypatch, capsys
):
  file = tmp_path / "file"
  file.write_text("")
  arguments = [x.format(file=file) for x in arguments]
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", ["accelerator_report.py", *arguments])
  assert accelerator_report.main() == 2
  shown = capsys.readouterr()
  assert shown.out == ""
  assert shown.err.startswith(message.format(file=file))
  assert shown.err.count("\n") == 1


def test_stages_are_listed(monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["accelerator_report.py", "--list"])
  assert accelerator_report.main() == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line[0] for line in lines] == [s.letter for s in stages.STAGES]


def test_workers_have_a_cpu_and_the_checkout(monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  monkeypatch.setenv("PYTHONPATH", "/elsewhere")
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
  found = supervise.environment()
  assert found["JAX_PLATFORMS"] == "cuda,cpu"
  assert found["PYTHONPATH"] == f"{ROOT}:/elsewhere"
  assert found["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"


def test_the_command_itself_imports_no_jax():
  code = (
    "import sys; sys.path.insert(0, sys.argv[1]); import scripts."
    "accelerator_report; sys.exit('jax' in sys.modules or 'numpy' in"
    " sys.modules)"
  )
  done = subprocess.run([sys.executable, "-P", "-c", code, str(ROOT)])
  assert done.returncode == 0


def test_a_run_that_is_ended_leaves_no_process_behind(tmp_path):
  """SIGTERM while a row hangs."""
  code = (
    "import sys, pathlib; sys.path.insert(0, sys.argv[1])\n"
    "from scripts import accelerator_report as command\n"
    "from scripts.report import stages\n"
    "from tests.report.test_supervision import stage\n"
    "stages.STAGES = (stage('without_end'),)\n"
    "sys.argv[1:] = ['--out', sys.argv[2], '--stages', 'a']\n"
    "sys.exit(command.main())\n"
  )
  process = subprocess.Popen([sys.executable, "-c", code, ROOT, tmp_path])
  report = tmp_path / "report.json"
  ends = time.monotonic() + 120
  while time.monotonic() < ends:
    if report.exists() and "first" in report.read_text():
      break
    time.sleep(0.1)
  process.terminate()
  assert process.wait(timeout=30) == 128 + 15
  (row,) = json.loads(report.read_text())["stages"][0]["rows"]
  assert row["name"] == "first"
  assert not _processes(str(tmp_path))


def _processes(word: str) -> list[str]:
  """Command lines of other processes that hold a word."""
  found = []
  for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
      with open(f"/proc/{pid}/cmdline") as file:
        line = file.read()
    except OSError:
      continue
    if word in line and int(pid) != os.getpid():
      found.append(line)
  return found
