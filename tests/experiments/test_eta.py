"""Time left, and something that moves, on a terminal."""

import io

import rich.console

from experiments.sweeps import report
from experiments.training import eta


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_time_left_with_lines_far_apart(monkeypatch):
  """rich's own column forgets what is older than 30 seconds."""
  now = [0.0]
  monkeypatch.setattr(eta.time, "perf_counter", lambda: now[0])
  left = eta.Eta(total=10, start=2)
  assert str(left) == "ETA -:--:--"
  now[0] = 1200.0
  left.reached(4)
  assert str(left) == "ETA 1:00:00"
  now[0] = 1201.0
  assert str(left) == "ETA 0:59:59"
  bar = eta.bar(left)
  bar.add_task("loss 1.6059  " * 9, total=100000, completed=99999)
  out = rich.console.Console(file=io.StringIO(), width=80)
  out.print(bar)
  (line,) = out.file.getvalue().splitlines()
  assert "ETA 0:59:59 loss 1.6059" in line and " 99999/100000 " in f" {line}"


def test_something_moves_on_a_terminal_only():
  shown, silent = Terminal(), io.StringIO()
  with eta.working("compiling", shown), eta.working("compiling", silent):
    pass
  assert "compiling" in shown.getvalue() and not silent.getvalue()


def test_names_do_not_wrap_at_80_columns(monkeypatch, capsys):
  monkeypatch.setenv("COLUMNS", "80")
  monkeypatch.setenv("FORCE_COLOR", "1")
  name = "minference_vertical_slash"
  header = ["method", *(f"keep {k}" for k in range(9))]
  report.show(report.Table(header, [[name, *["97.5 1.00x"] * 9]]))
  assert name in capsys.readouterr().out
