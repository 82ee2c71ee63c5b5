"""The training loop.

python -m experiments.train --config configs/digits.py --workdir DIR
"""

import contextlib
import dataclasses
import pathlib
from contextlib import closing
from typing import Any

import flax.linen as nn

from experiments.data import pipeline
from experiments.evaluate import evaluate, load_run
from experiments.training import (
  checkpoints,
  compiled,
  errors,
  progress,
  published,
  rundir,
)
from experiments.training import config as config_lib
from experiments.training import mesh as mesh_lib
from experiments.training import state as state_lib
from experiments.training.eta import working
from experiments.training.meter import Meter
from experiments.training.preemption import Preemption
from experiments.training.profiling import Profile


@dataclasses.dataclass(frozen=True)
class Run:
  """What `main` returns.

  Attributes:
    config: the typed config.
    model: as trained, slots filled.
    state: of the last step.
    metrics: of the evaluation at the end; empty if it was not reached.
    finished: False if a signal ended it; start it again to go on.
  """

  config: config_lib.Config
  model: nn.Module
  state: state_lib.State
  metrics: dict[str, float]
  finished: bool = True

  @property
  def params(self) -> Any:
    """Parameters to use: the running average where there is one."""
    return self.state.best

  def heldout(self, limit: int | None = None) -> pipeline.Batch:
    """The held-out split, prepared, as arrays: "image", "label"."""
    return pipeline.heldout_arrays(self.config.data, limit)


def main(
  config: Any, workdir: str | pathlib.Path, profile: str | None = None
) -> Run:
  """Trains as `config` says; goes on where an earlier call was stopped.

  Args:
    config: a `Config` or what `config.load` takes.
    workdir: everything is written under it.
    profile: "10:15" captures these steps under `workdir/profile`.

  Raises:
    ConfigError, ValueError: a config that does not fit.
    WorkdirError: another run uses the directory, or it cannot be one.
    CheckpointError: a checkpoint cannot be written or read.
    FloatingPointError: the run has diverged; the last good checkpoint stays.
  """
  config, workdir = config_lib.load(config), rundir.make(workdir)
  with contextlib.ExitStack() as stack:
    stack.enter_context(errors.disk_errors(workdir))
    stack.enter_context(rundir.locked(workdir))
    preemption = stack.enter_context(Preemption())
    profile = stack.enter_context(closing(Profile(profile, workdir)))
    return _train(config, workdir, preemption, profile, stack)


def _train(config, workdir, preemption, profile, stack) -> Run:
  # ----- Devices and data -----
  written = config.to_dict()
  mesh = mesh_lib.for_run(config)
  batches = pipeline.train_batches(
    config, to_device=lambda batch: mesh_lib.put_batch(mesh, batch)
  )
  stack.enter_context(closing(batches))

  # ----- Model, teacher, programs -----
  teacher, teacher_params = _teacher(config, mesh)
  programs = compiled.Programs.of(config, mesh, teacher)

  # ----- From the last checkpoint, or from the start -----
  saved = checkpoints.Checkpoints(workdir, config.checkpoint.keep)
  stack.enter_context(closing(saved))
  start = saved.latest() or 0
  if start:
    state, position = saved.restore(start, programs.shapes(), written)
    batches.set_state(position)
  else:
    first = _first(config, mesh, programs.shapes().params)
    with working("compiling the start"):
      state = programs.start(config.seed, first)
  rundir.record(
    workdir, written, progress.parameter_table(config, state.params)
  )

  # ----- The step, compiled; once more at each level of a warm-up -----
  level = config.recipe.level(start, config.steps)
  with working("compiling the step"):
    step_fn = programs.step(level, teacher_params)
  meter = Meter.of(config, step_fn)

  # ----- Train -----
  log = stack.enter_context(closing(progress.Log(workdir, start, config.steps)))
  log.note(progress.summary(config, mesh, start, state.params))
  if start and (planned := saved.config(start)["steps"]) < config.steps:
    log.note(
      f"{config.steps} steps, {planned} when this run was last started:"
      " schedules are now those of the longer run"
    )
  stop = False
  for step in range(start + 1, config.steps + 1):
    if level != (level := config.recipe.level(step - 1, config.steps)):
      with meter.away():
        step_fn = programs.step(level, teacher_params)
      meter.runs(step_fn)
    with profile.step(step):
      with meter.waiting():
        batch = next(batches)
      state, values = step_fn(state, batch, teacher_params)
    saved.check()
    stop = preemption.reached(step)
    last = stop or step == config.steps
    if last or step % config.log_every == 0:
      log.write(step, {**progress.finite(step, values), **meter.read()})
    if last or step % config.checkpoint.every == 0:
      progress.finite(step, values)
      saved.save(step, state, batches.get_state(), written)
    if stop:
      break
    if step % config.eval_every == 0 and not last:
      with meter.away():
        metrics = evaluate(config, programs.model, state.best, mesh)
      log.write(step, metrics, "heldout")

  # ----- Finish -----
  metrics = {}
  if not stop:
    metrics = evaluate(config, programs.model, state.best, mesh)
    log.write(config.steps, metrics, "heldout")
  saved.wait()
  if stop:
    log.note(f"{preemption.name}: saved step {step}; start again to go on")
  return Run(config, programs.model, state, metrics, finished=not stop)


def _teacher(config, mesh) -> tuple[nn.Module | None, Any]:
  """The model to distil from, a run's or a published one; None: none."""
  source = config.teacher
  if source is None or published.is_run(source):
    return load_run(source, mesh)
  dtype = config_lib.DTYPES[config.precision]
  return published.load_teacher(config, mesh, dtype)


def _first(config, mesh, shapes) -> Any:
  """Parameters to start from, a run's or published ones; None: none."""
  if config.init is None:
    return None
  if published.is_run(config.init):
    _, found = load_run(config.init, mesh)
  else:
    found = published.first_params(config, mesh)
  return published.without_fresh(found, config.fresh, shapes)


if __name__ == "__main__":
  from experiments import launch
  from experiments.command import Command, Option

  launch.start(
    Command(
      __doc__ or "",
      (
        launch.workdir(),
        Option("profile", str, None, "FIRST:LAST steps to trace."),
        *launch.COMMON,
      ),
      (config_lib.Config,),
    ),
    lambda given: main(given.config, given.workdir, given.profile),
  )
