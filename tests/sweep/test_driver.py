"""The sweep's driver, on a kind of model that compiles nothing."""

import dataclasses
import time
from typing import Annotated, Any

import numpy as np
import pytest

from experiments import sweep, typed
from experiments.sweeps import count
from experiments.sweeps.report import Loss, Plot, Table
from experiments.sweeps.subject import Job, Sweep, Unfit
from tokjax.analysis import plots


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where toys come from."""


@dataclasses.dataclass(frozen=True)
class Toys(Sweep):
  """Settings: nothing but what all kinds share, and one that rows need."""

  subject: Annotated[Any, typed.OneOf({"toys": Origin})]
  families: tuple[str, ...] = ("baseline",)
  size: int = 1

  SUBJECTS = {"toys": Origin}
  STEM, PICTURE = "toys", "toys.txt"
  DEPENDS = ("subject", "size")
  NOTHING = "none"

  def prepare(self, workdir):
    return ToySubject()


@dataclasses.dataclass
class Toy:
  job: Job


class ToySubject:
  """Gives what it was asked for; knows what it was asked."""

  origin = "a box"
  compiled: list[tuple[str, float | None]] = []

  def compile(self, job):
    self.compiled.append((job.method, job.keep))
    if job.keep == 0.1:
      raise Unfit(job, "too little")
    return Toy(job)

  def score(self, programs, whole, told):
    assert whole.job == Job("none", None)
    told(1, 2)
    return [{"left": p.job.keep or 1.0} for p in programs]

  def calls(self, program):
    wait = 0.02 if program.job.keep is None else 0.001
    return {"run": lambda: time.sleep(wait), "walk": lambda: np.zeros(())}

  def speed(self, seconds):
    assert {k: v.shape for k, v in seconds.items()} == {
      "run": (3, 2), "walk": (3, 2),
    }  # fmt: skip
    own, whole = seconds["run"].T
    return {"faster": float(np.median(whole / own))}

  def plot(self, results):
    axis = plots.Axis("lost", 1.0)
    return Plot(
      "toys", {"saved": lambda r: 1 / r["left"]},
      [Loss(axis, lambda r: 1 - r["left"])],
    )  # fmt: skip

  def table(self, results):
    rows = [(r["method"], f"{r['left']:g}") for r in results.rows]
    return Table(("toy", "left"), rows, title="All toys")

  def picture(self, results, methods, path):
    path.write_text(" ".join(methods))


@pytest.fixture(autouse=True)
def kind(monkeypatch):
  monkeypatch.setattr(sweep, "KINDS", (*sweep.KINDS, Toys))
  monkeypatch.setattr(ToySubject, "compiled", [])


def config(**changes):
  return {
    "subject": {"name": "toys"}, "recipes": ("stride", "tap_adl"),
    "keeps": (0.5, 0.1), "rounds": 3, **changes,
  }  # fmt: skip


def test_a_kind_says_what_differs_and_the_driver_does_the_rest(
  tmp_path, capsys
):
  results = sweep.main(config(), tmp_path)
  found = [(r["method"], r["keep"], r["left"]) for r in results.rows]
  # `tap_adl` saves nothing, so that no keep ratio changes it.
  assert found == [
    ("none", 1.0, 1.0), ("tap_adl", 1.0, 1.0), ("stride", 0.5, 0.5),
  ]  # fmt: skip
  assert results.rows[2]["faster"] > 1
  assert results.unreachable == [
    {"method": "stride", "keep": 0.1, "reason": "too little"}
  ]
  assert ToySubject.compiled == [
    ("none", None), ("tap_adl", 1.0), ("stride", 0.5), ("stride", 0.1),
  ]  # fmt: skip
  shown = capsys.readouterr().out
  assert "All toys" in shown and "stride at keep 0.1: too little" in shown
  assert (tmp_path / "toys.png").read_bytes().startswith(b"\x89PNG")
  assert (tmp_path / "toys.txt").read_text() == "stride tap_adl"


def test_progress_counts_parts_of_recipes(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(count, "BETWEEN", 0.0)
  sweep.main(config(recipes=("stride",)), tmp_path)
  told = [
    line.split("  ") for line in capsys.readouterr().out.splitlines()
    if line.startswith("recipes")
  ]  # fmt: skip
  assert [(line[0], line[-1]) for line in told] == [
    ("recipes 0.5/3", "the unreduced model, 1 of 2"),
    ("recipes 1/3", "measured the unreduced model"),
    ("recipes 1.5/3", "compiled stride at 0.5"),
    ("recipes 1.75/3", "stride at 0.5, 1 of 2"),
    ("recipes 2/3", "measured stride at 0.5"),
    ("recipes 2.5/3", "compiled stride at 0.1"),
    ("recipes 3/3", "nothing to measure at 0.1"),
  ]


def test_only_what_is_missing_is_made(tmp_path):
  sweep.main(config(keeps=(0.5,)), tmp_path)
  ToySubject.compiled.clear()
  again = sweep.main(config(keeps=(0.5, 0.1, 0.3)), tmp_path)
  assert ToySubject.compiled == [
    ("none", None), ("stride", 0.1), ("stride", 0.3),
  ]  # fmt: skip
  ToySubject.compiled.clear()
  assert sweep.main(config(keeps=(0.5, 0.1, 0.3)), tmp_path).rows == again.rows
  assert not ToySubject.compiled


def test_rows_of_other_settings_are_moved_aside(tmp_path):
  sweep.main(config(keeps=(0.5,)), tmp_path)
  sweep.main(config(keeps=(0.5,), size=2), tmp_path)
  assert ToySubject.compiled.count(("stride", 0.5)) == 2
  assert len(list(tmp_path.glob("toys.*.json"))) == 1


def test_the_unreduced_model_is_no_method(tmp_path):
  results = sweep.main(config(recipes=("none", "stride")), tmp_path)
  assert [r["method"] for r in results.rows] == ["none", "stride"]


def test_nothing_to_compare_is_a_table_of_one_row(tmp_path):
  results = sweep.main(config(keeps=(0.1,), recipes=("stride",)), tmp_path)
  assert [r["method"] for r in results.rows] == ["none"]
  assert not (tmp_path / "toys.png").exists()


def test_an_unreduced_model_that_cannot_be_is_one_error(tmp_path, monkeypatch):
  def never(self, job):
    raise Unfit(job, "no toys today")

  monkeypatch.setattr(ToySubject, "compile", never)
  with pytest.raises(typed.ConfigError, match="no toys today"):
    sweep.main(config(), tmp_path)
