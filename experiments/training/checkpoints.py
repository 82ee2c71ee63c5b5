"""Checkpoints: orbax, wrapped once.

`DIR/checkpoints/<step>` holds the state (sharded arrays), the position of the
data iterator, the config, and checksums of all three. Writing is asynchronous
and atomic: a directory with that name is complete. Reading verifies the
checksums.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import typed
from experiments.training import checksums, trees
from experiments.training.errors import CheckpointError, first_line, writing

FORMAT = "tokjax training state 2"
# What was written before there were checksums is read without verifying.
UNVERIFIED = "tokjax training state 1"
# What may differ between the runs that share a directory.
FREE = (
  "log_every", "eval_every", "eval_batch_size", "checkpoint", "mesh",
  "threads", "processes",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
  """When a run is saved.

  Attributes:
    every: steps between checkpoints; the last step is always saved.
    keep: how many remain.
  """

  every: int = 500
  keep: int = 2

  def __post_init__(self):
    if self.every < 1 or self.keep < 1:
      raise ValueError("every and keep must be 1 or more")


class Checkpoints:
  """The checkpoints of one run directory."""

  def __init__(
    self, workdir: pathlib.Path, keep: int = 2, *, read_only: bool = False
  ):
    self._directory = workdir.resolve() / "checkpoints"
    if read_only and not self._directory.is_dir():
      raise CheckpointError(f"{self._directory}: does not exist")
    self._writes = "a checkpoint"
    try:
      self._manager = _manager(self._directory, keep, read_only)
    except OSError:
      raise
    except Exception as error:  # Orbax passes on errors of any type.
      raise CheckpointError(
        f"{self._directory}: cannot be read ({first_line(error)})"
      ) from error

  def latest(self) -> int | None:
    """The last complete step; None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, data: Any, config: dict) -> None:
    """Starts writing; returns when the state's buffers may be reused.

    Raises:
      FloatingPointError: the state has diverged; nothing of it is written.
      CheckpointError: this or the previous checkpoint cannot be written.
    """
    if step == self.latest():
      return
    arrays, diverged = checksums.inspect(state)
    if diverged:
      raise FloatingPointError(self._diverged(step, diverged))
    meta = {
      "format": FORMAT,
      "config": config,
      "arrays": arrays,
      "data": checksums.of_json(data),
    }
    meta["checksum"] = checksums.of_json(meta)
    self.wait()  # An error of the previous one names that one.
    self._writes = f"step {step}"
    with writing(self._directory, self._writes):
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state),
          data=ocp.args.JsonSave(data),
          meta=ocp.args.JsonSave(meta),
        ),
        force=True,
      )

  def restore(self, step: int, state: Any, config: dict) -> tuple[Any, Any]:
    """State and data position of a step.

    Args:
      step: one that exists.
      state: shapes, dtypes and shardings to restore into.
      config: of this run, which must agree with the checkpoint's.

    Raises:
      CheckpointError: damaged, foreign or of another configuration.
    """
    meta = self._meta(step)
    self._check_config(step, meta["config"], config)
    _check_shapes(self._path(step), self._shapes(step), state)
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=_restore_args(state), data=ocp.args.JsonRestore()
        ),
      )
    except Exception as error:  # Orbax passes on errors of any type.
      raise self._damaged(step, error) from error
    self._verify(step, meta, restored.state)
    if "data" in meta and checksums.of_json(restored.data) != meta["data"]:
      raise self._not_as_saved(step, "data", "the position in the data")
    return restored.state, restored.data

  def restore_params(self, step: int, sharding: Any) -> Any:
    """Averaged parameters (raw ones without an average) of a step.

    Raises:
      CheckpointError: damaged or foreign.
    """
    meta = self._meta(step)
    found = self._shapes(step)
    wanted = "params" if found["ema"] is None else "ema"
    tree = jax.tree.map(lambda _: ocp.PLACEHOLDER, found)
    tree[wanted] = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      found[wanted],
    )
    try:
      restored = self._manager.restore(
        step, args=ocp.args.Composite(state=_restore_args(tree))
      )
    except Exception as error:  # Orbax passes on errors of any type.
      raise self._damaged(step, error) from error
    params = restored.state[wanted]
    self._verify(step, meta, {wanted: params})
    return params

  def config(self, step: int) -> dict:
    """The config that a checkpoint was written with."""
    return self._meta(step)["config"]

  def check(self) -> None:
    """Raises what went wrong with writing so far; does not wait for it."""
    with writing(self._directory, self._writes):
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Until everything is on disk."""
    with writing(self._directory, self._writes):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def close(self) -> None:
    """Waits for what is being written, and raises what went wrong with it."""
    with writing(self._directory, self._writes):
      self._manager.close()

  def _meta(self, step: int) -> dict[str, Any]:
    """Format, config and checksums of a step, themselves verified."""
    path = self._path(step)
    try:
      meta = json.loads((path / "meta" / "metadata").read_text())
    except (OSError, ValueError, RecursionError) as error:
      raise CheckpointError(
        f"{path}: not a checkpoint of this loop, or damaged"
        f" ({first_line(error)}). {self._advice(step)}"
      ) from error
    known = (FORMAT, UNVERIFIED)
    if not isinstance(meta, dict) or meta.get("format") not in known:
      raise CheckpointError(
        f"{path}: its format is not {FORMAT!r}. {self._advice(step)}"
      )
    checksum = meta.pop("checksum", None)
    unverified = meta["format"] == UNVERIFIED and checksum is None
    if not unverified and checksum != checksums.of_json(meta):
      raise self._not_as_saved(step, "meta/metadata", "the config")
    if not isinstance(meta.get("config"), dict):
      raise self._not_as_saved(step, "meta/metadata", "the config")
    return meta

  def _verify(self, step: int, meta: dict[str, Any], tree: Any) -> None:
    """Compares arrays that were read with what was written."""
    found, diverged = checksums.inspect(tree)
    if "arrays" in meta:
      saved = meta["arrays"]
      wrong = [name for name in found if saved.get(name) != found[name]]
      if wrong:
        raise self._not_as_saved(step, "state", _listed(wrong))
    if diverged:
      raise CheckpointError(self._diverged(step, diverged))

  def _not_as_saved(self, step: int, file: str, what: str) -> CheckpointError:
    return CheckpointError(
      f"{self._path(step) / file} is damaged: {what} is not what was saved"
      f" (its checksum differs). {self._advice(step)}"
    )

  def _diverged(self, step: int, names: list[str]) -> str:
    what = f"{_listed(names)} is not finite"
    state = f"step {step}: the state has diverged, {what}"
    if step in self._manager.all_steps():
      return f"{self._path(step)}: {state}. {self._advice(step)}"
    last = self.latest()
    then = "there is no checkpoint" if last is None else (
      f"the last checkpoint is that of step {last}"
    )
    return f"{state}; not saved, {then}"

  def _shapes(self, step: int) -> dict[str, Any]:
    """Shape and dtype of every array of a step's state."""
    try:
      return dict(self._manager.item_metadata(step).state)
    except Exception as error:  # Orbax passes on errors of any type.
      raise self._damaged(step, error) from error

  def _path(self, step: int) -> pathlib.Path:
    return self._directory / str(step)

  def _check_config(self, step: int, saved: dict, config: dict) -> None:
    old, new = typed.flatten(saved), typed.flatten(config)
    if new["steps"] > old["steps"]:  # The same run, trained longer.
      old["steps"] = new["steps"]
    lines = [
      f"  {key}: {old.get(key)!r} in the checkpoint, {new.get(key)!r} now"
      for key in sorted(old.keys() | new.keys())
      if old.get(key) != new.get(key) and key.split(".")[0] not in FREE
    ]
    if lines:
      raise CheckpointError(
        f"{self._path(step)} was written with another config:\n"
        + "\n".join(lines)
        + "\nUse another workdir, or the values of the checkpoint."
      )

  def _damaged(self, step: int, error: Exception) -> CheckpointError:
    return CheckpointError(
      f"{self._path(step)}: cannot be read; it is damaged"
      f" ({first_line(error)}). {self._advice(step)}"
    )

  def _advice(self, step: int) -> str:
    older = [s for s in self._manager.all_steps() if s < step]
    then = f"continue from step {max(older)}" if older else "start again"
    return f"Remove that directory to {then}."


def _manager(
  directory: pathlib.Path, keep: int, read_only: bool
) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    directory,
    item_handlers={
      "state": ocp.PyTreeCheckpointHandler(type_handler_registry=_handlers()),
      "data": ocp.JsonCheckpointHandler(),
      "meta": ocp.JsonCheckpointHandler(),
    },
    options=ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep,
      create=not read_only,
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
    ),
  )


def _handlers() -> ocp.type_handlers.TypeHandlerRegistry:
  """Arrays are written whole by one process.

  By default every device writes a slice of an array that all devices hold:
  with several processes that shares out the work, in one it only compiles a
  program for every slice.
  """
  arrays = ocp.type_handlers.ArrayHandler(
    use_replica_parallel=jax.process_count() > 1
  )
  # What is read without devices, such as parameters alone, is NumPy's.
  return ocp.type_handlers.create_type_handler_registry(
    (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
  )


def _listed(names: list[str]) -> str:
  """One name, and how many more there are."""
  more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
  return f"{names[0]}{more}"


def _restore_args(tree: Any) -> ocp.args.PyTreeRestore:
  how = ocp.checkpoint_utils.construct_restore_args(tree)
  return ocp.args.PyTreeRestore(item=tree, restore_args=how)


def _check_shapes(path: pathlib.Path, found: Any, state: Any) -> None:
  """Lists every array that the checkpoint has otherwise, or not at all."""

  def shapes(tree):
    leaves = trees.named(tree).items()
    return {name: (tuple(x.shape), str(x.dtype)) for name, x in leaves}

  old, new = shapes(found), shapes(state)
  lines = [
    f"  {key}: {old.get(key, 'absent')} in the checkpoint,"
    f" {new.get(key, 'absent')} now"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  ]
  if lines:
    shown, more = lines[:20], len(lines) - 20
    shown += [f"  and {more} more"] if more > 0 else []
    raise CheckpointError(
      f"{path} does not fit the model:\n" + "\n".join(shown)
    )
