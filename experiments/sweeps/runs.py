"""Training runs that sweeps need before they can compare anything."""

import pathlib
from typing import Any

from experiments import train


def trained(config: Any, folder: pathlib.Path) -> Any:
  """Parameters of a run in `folder`, trained unless that is done.

  Args:
    config: see `experiments.train.main`.
    folder: of the run; it goes on where it was stopped.

  Raises:
    SystemExit: the run was stopped by a signal; its state is saved.
  """
  run = train.main(config, folder)
  if not run.finished:
    raise SystemExit("training was interrupted; start again to go on")
  return run.params
