"""The fuzz programme finds a fault that is put into it."""

import pytest

from scripts import fuzz


def faults(*flags: str) -> int:
  return fuzz.main(fuzz.parse(["--minutes", "5", "--seed", "0", *flags]))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("stage", ["configs", "kernels"])
def test_a_planted_fault_is_found(stage, capsys):
  """Of damaged files a flipped bit may be harmless: nothing is sure there."""
  command = "--stages", stage, "--cases", "1", "--plant", stage
  assert faults(*command) >= 1
  shown = capsys.readouterr().out
  assert f"FAULT python -m scripts.fuzz --stages {stage}" in shown


def test_sound_code_gives_none_and_counts(capsys):
  assert faults("--stages", "configs", "--cases", "2") == 0
  shown = capsys.readouterr().out
  assert "2 cases" in shown and "refused" in shown and "seed 0" in shown
