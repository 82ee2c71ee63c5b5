"""Checkpoints: orbax, wrapped once.

`DIR/checkpoints/<step>` holds the state (sharded arrays), the position of the
data iterator and the config. Writing is asynchronous and atomic: a directory
with that name is complete.
"""

import contextlib
import dataclasses
import errno
import json
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments import typed
from experiments.training import trees

FORMAT = "tokjax training state 1"
# What may differ between the runs that share a directory.
FREE = (
  "log_every", "eval_every", "eval_batch_size", "checkpoint", "mesh",
  "threads", "processes",
)  # fmt: skip


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be written or read; the message says which."""


@dataclasses.dataclass(frozen=True)
class Options:
  """Attributes:
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
    self._manager = ocp.CheckpointManager(
      self._directory,
      item_handlers={
        "state": ocp.PyTreeCheckpointHandler(),
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

  def latest(self) -> int | None:
    """The last complete step; None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, data: Any, config: dict) -> None:
    """Starts writing; returns when the state's buffers may be reused."""
    if step == self.latest():
      return
    meta = {"format": FORMAT, "config": config}
    with self._writing(step):
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
    self._check_config(step, self.config(step), config)
    _check_shapes(self._path(step), self._shapes(step), state)
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=_restore_args(state), data=ocp.args.JsonRestore()
        ),
      )
    except Exception as error:  # Orbax raises whatever its parts do.
      raise self._damaged(step, error) from error
    return restored.state, restored.data

  def restore_params(self, step: int, sharding: Any) -> Any:
    """Averaged parameters (raw ones without an average) of a step."""
    self.config(step)
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
    except Exception as error:  # Orbax raises whatever its parts do.
      raise self._damaged(step, error) from error
    return restored.state[wanted]

  def config(self, step: int) -> dict:
    """The config that a checkpoint was written with."""
    path = self._path(step)
    try:
      meta = json.loads((path / "meta" / "metadata").read_text())
    except (OSError, json.JSONDecodeError) as error:
      raise CheckpointError(
        f"{path}: not a checkpoint of this loop, or damaged ({error})."
        f" {self._advice(step)}"
      ) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
      raise CheckpointError(
        f"{path}: its format is not {FORMAT!r}. {self._advice(step)}"
      )
    return meta["config"]

  def wait(self) -> None:
    """Until everything is on disk."""
    with self._writing(None):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()

  def close(self) -> None:
    self._manager.close()

  def _shapes(self, step: int) -> dict[str, Any]:
    """Shape and dtype of every array of a step's state."""
    try:
      return dict(self._manager.item_metadata(step).state)
    except Exception as error:  # Orbax raises whatever its parts do.
      raise self._damaged(step, error) from error

  def _path(self, step: int) -> pathlib.Path:
    return self._directory / str(step)

  def _check_config(self, step: int, saved: dict, config: dict) -> None:
    old, new = typed.flatten(saved), typed.flatten(config)
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
    reason = str(error).splitlines()[0][:300] if str(error) else repr(error)
    return CheckpointError(
      f"{self._path(step)}: cannot be read; it is damaged"
      f" ({type(error).__name__}: {reason}). {self._advice(step)}"
    )

  def _advice(self, step: int) -> str:
    older = [s for s in self._manager.all_steps() if s < step]
    then = f"continue from step {max(older)}" if older else "start again"
    return f"Remove that directory to {then}."

  def _writing(self, step: int | None) -> "_Writing":
    return _Writing(self._directory, step)


class _Writing:
  """Turns what orbax raises while it writes into one clear error."""

  def __init__(self, directory: pathlib.Path, step: int | None):
    self._directory, self._step = directory, step

  def __enter__(self):
    return self

  def __exit__(self, kind, error, _):
    if isinstance(error, Exception):
      which = "a checkpoint" if self._step is None else f"step {self._step}"
      raise _not_written(self._directory, which, error) from error


@contextlib.contextmanager
def disk_errors(workdir: pathlib.Path):
  """A full disk, whoever notices it first, is a CheckpointError."""
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      raise
    raise _not_written(workdir, "the run", error) from error


def _not_written(
  directory: pathlib.Path, which: str, error: Exception
) -> CheckpointError:
  free = shutil.disk_usage(directory).free / 2**20
  return CheckpointError(
    f"{directory}: {which} could not be written; {free:.1f} MiB are free there."
    " Older checkpoints are as they were; make room and start again."
    f" ({type(error).__name__}: {str(error)[:300]})"
  )


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
