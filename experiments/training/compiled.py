"""The programs of a run: its start and its step, compiled once a process.

Runs whose programs are equal share them, so that a run that goes on in the
process in which it was stopped (a notebook), or one that differs in its seed
only, does not compile again.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from experiments.data import pipeline
from experiments.training import checkpoints, optim
from experiments.training import mesh as mesh_lib
from experiments.training import state as state_lib
from experiments.training.config import Config
from tokjax import xla_options

# A start runs once; a CPU would optimise it for longer than it runs.
UNOPTIMISED = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


@dataclasses.dataclass(frozen=True)
class Programs:
  """What a run compiles; two equal ones are compiled once.

  Attributes:
    config: without what its programs do not depend on.
    model: as it is used after training.
    mesh: of the devices.
    teacher: a model to distil from, or None.
  """

  config: Config
  model: nn.Module
  mesh: jax.sharding.Mesh
  teacher: nn.Module | None = None

  @classmethod
  def of(
    cls, config: Config, mesh: jax.sharding.Mesh, teacher: nn.Module | None
  ) -> "Programs":
    """The programs of a config."""
    shared = dataclasses.replace(
      config, init=None, fresh=None, teacher=None, seed=0, log_every=1,
      eval_every=1, checkpoint=checkpoints.Options(), threads=1, processes=0,
    )  # fmt: skip
    return cls(shared, config.build_model(), mesh, teacher)

  def shapes(self) -> state_lib.State:
    """Shape, type and sharding of every array of the state."""
    return _shapes(self)

  def start(self, seed: int, params: Any) -> state_lib.State:
    """The first state; see `state.init`."""
    return _start(self)(np.uint32(seed), params)

  def step(self, level: int | None, teacher_params: Any) -> jax.stages.Compiled:
    """The step at a level of a warm-up of the recipe (None: there is none)."""
    model = self.model.clone(slots=self.config.recipe.slots(level))
    batch = mesh_lib.batch_shapes(
      self.mesh, _example(self), self.config.batch_size
    )
    lowered = _step(self, model).lower(self.shapes(), batch, teacher_params)
    return lowered.compile()


@functools.lru_cache(maxsize=16)
def _example(programs: Programs) -> pipeline.Batch:
  """One row of a batch."""
  return pipeline.heldout_arrays(programs.config.data, 1)


def _optimizer(programs: Programs):
  return optim.build(programs.config.optimizer, programs.config.steps)


def _init(programs: Programs, seed, params) -> state_lib.State:
  example = programs.config.task.inputs(
    _example(programs), programs.model
  )
  return state_lib.init(
    programs.config, programs.model, example, _optimizer(programs), params, seed
  )


@functools.lru_cache(maxsize=16)
def _shapes(programs: Programs) -> state_lib.State:
  shapes = jax.eval_shape(lambda: _init(programs, 0, None))
  return mesh_lib.with_sharding(programs.mesh, shapes)


def _sharding(programs: Programs) -> state_lib.State:
  return jax.tree.map(lambda x: x.sharding, _shapes(programs))


@functools.lru_cache(maxsize=16)
def _start(programs: Programs):
  return jax.jit(
    functools.partial(_init, programs),
    out_shardings=_sharding(programs),
    compiler_options=xla_options.known(UNOPTIMISED) or None,
  )


@functools.lru_cache(maxsize=16)
def _step(programs: Programs, model: nn.Module):
  """JAX keeps what it compiled for a jitted function as long as that lives."""
  step = state_lib.make_step(
    programs.config, model, _optimizer(programs), programs.teacher
  )
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(_sharding(programs), mesh_lib.replicated(programs.mesh)),
  )
