"""Readers of published values: any JSON value is followed, or refused."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_any_value_in_any_place_is_followed_or_one_error():
  done = subprocess.run(
    [sys.executable, "-m", "tests.interop.strange"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.stdout == "all are followed or refused\n", done.stderr[-2000:]
