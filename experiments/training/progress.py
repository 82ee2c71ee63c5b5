"""What a person sees of a run: a bar or plain lines, JSONL and TensorBoard."""

import contextlib
import errno
import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax

from experiments.training import eta, optim, rows, trees
from experiments.training.board import Board
from experiments.training.config import Config

# What a log line shows, in this order; the files have everything.
SHOWN = ("loss", "accuracy")
RATES = ("images_per_second", "tokens_per_second")


class Log:
  """Writes metrics of a run; processes other than the first write nothing.

  `metrics.jsonl` has one object a line with "step" and "split"; a resumed run
  removes what a lost part of the run had written after its checkpoint.
  """

  def __init__(self, workdir: pathlib.Path, start: int, steps: int):
    self._steps, self._eta = steps, eta.Eta(steps, start)
    self._bar = self._file = self._board = None
    if jax.process_index():
      return
    path = workdir / rows.NAME
    rows.keep_until(path, start)
    self._file = path.open("a")
    self._board = Board(workdir / "tensorboard", start + 1)
    if sys.stdout.isatty():
      self._bar = eta.bar(self._eta)
      self._task = self._bar.add_task("", total=steps, completed=start)
      self._bar.start()

  def note(self, text: str) -> None:
    """A line that is no metric."""
    if self._file is None:
      return
    with unread():
      if self._bar is not None:
        self._bar.console.print(text, highlight=False, markup=False)
      else:
        print(text, flush=True)

  def write(
    self, step: int, values: Mapping[str, float], split: str = "train"
  ) -> None:
    """Metrics of a step to every place."""
    if self._file is None:
      return
    values = {k: float(v) for k, v in values.items()}
    row = {"step": step, "split": split, **values}
    self._file.write(json.dumps(row) + "\n")
    self._file.flush()
    self._board.write(step, {f"{split}/{k}": v for k, v in values.items()})
    shown = "  ".join(f"{k} {values[k]:.4f}" for k in SHOWN if k in values)
    if split != "train":
      return self.note(f"step {step}  {split}: {shown}")
    self._eta.reached(step)
    if self._bar is not None:
      shown = f"{shown}  {_rates(values)}"
      return self._bar.update(self._task, completed=step, description=shown)
    self.note(
      f"step {step}/{self._steps}  {shown}  {_rates(values)}  {self._eta}"
    )

  def close(self) -> None:
    if self._file is None:
      return
    with unread():
      if self._bar is not None:
        self._bar.stop()
    self._file.close()
    self._board.close()


@contextlib.contextmanager
def unread():
  """Around printing: goes on in silence once standard output is closed.

  `train | head` and a terminal that was closed end the reading, not the run.
  """
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.EPIPE, errno.EIO):
      raise
    silence()


def silence() -> None:
  """Sends standard output nowhere, so that Python can flush it at its end."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, sys.stdout.fileno())
  os.close(nowhere)


def _rates(values: Mapping[str, float]) -> str:
  """`612 images/s  data 0.4 %  MFU 31 %`; data: share of time waited for it."""
  units = {k.removesuffix("_per_second") for k in values if k in RATES}
  parts = [f"{values[f'{unit}_per_second']:.0f} {unit}/s" for unit in units]
  parts.append(f"data {100 * values['wait']:.1f} %")
  if "mfu" in values:
    parts.append(f"MFU {100 * values['mfu']:.0f} %")
  return "  ".join(parts)


def parameter_table(config: Config, params: Any) -> str:
  """Name, shape, type and size of every parameter; their sum at the end."""
  named = trees.named(params)
  held = trees.named(optim.frozen(config.optimizer, params))
  width = max(len(name) for name in named)
  lines = [
    f"{name:{width}}  {str(tuple(x.shape)):18} {x.dtype}  {x.size:>12,}"
    + ("  frozen" if held[name] else "")
    for name, x in named.items()
  ]
  total = sum(x.size for x in named.values())
  moving = sum(x.size for name, x in named.items() if not held[name])
  lines.append(f"{total:,} parameters, {moving:,} of them trained")
  return "\n".join(lines)


def summary(config: Config, mesh: jax.sharding.Mesh, start: int, params) -> str:
  """One paragraph about the run."""
  axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
  device = jax.devices()[0].device_kind
  begin = f"resumed at step {start}" if start else "from the start"
  return (
    f"{parameter_table(config, params).splitlines()[-1]}; recipe"
    f" {config.recipe.name}; {jax.device_count()} x {device} ({axes}); {begin}"
  )


def finite(step: int, values: Mapping[str, jax.Array]) -> dict[str, float]:
  """The metrics as numbers.

  Raises:
    FloatingPointError: the loss is NaN or infinite; nothing of it is saved.
  """
  values = {k: float(v) for k, v in values.items()}
  if not math.isfinite(values["loss"]):
    raise FloatingPointError(
      f"step {step}: loss is {values['loss']}; not saved, so that a restart"
      " goes on from the last checkpoint"
    )
  return values
