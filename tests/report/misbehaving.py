"""Stages that go wrong in all ways that a row can."""

import os
import time

from scripts.report.jobs import Job


def jobs(here):
  """Each fault is followed by a row that works."""
  del here
  fine = lambda: {"seconds": 1.0, "fastest": 1.0, "slowest": 1.0}
  return [
    Job("first", fine),
    Job("raises", _raise),
    Job("after an exception", fine),
    Job("dies", lambda: os._exit(7)),
    Job("after a death", fine),
    Job("hangs", lambda: time.sleep(1000)),
    Job("after a hang", fine),
    Job("rests on what went wrong", fine, ("raises",)),
  ]


def _raise():
  raise ArithmeticError("the result is\nwrong")


def without_end(here):
  """A row that works, one that hangs, and one that is never begun."""
  return [jobs(here)[n] for n in (0, 5, 6)]


def does_not_start(here):
  raise ImportError("no module named flex")
