"""What training changes, and the one step that changes it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.training import optim, trees
from experiments.training.config import Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """All that training changes; what a checkpoint holds.

  Attributes:
    step: optimiser steps made.
    params: of the model, float32.
    ema: their running average; None: no average.
    opt_state: of the optimiser.
    key: random bits of the run `[2]`; every step folds its number in.
  """

  step: jax.Array
  params: Any
  ema: Any
  opt_state: Any
  key: jax.Array

  @property
  def best(self) -> Any:
    """Parameters to evaluate: the average where there is one."""
    return self.params if self.ema is None else self.ema


def init(
  config: Config,
  model: nn.Module,
  example: Any,
  optimizer: optax.GradientTransformation,
  params: Any = None,
  seed: Any = None,
) -> State:
  """The state before the first step; to be traced.

  Args:
    example: input of the model, one row.
    params: start from these; other parameters of the model, such as a recipe's
      own, start at random.
    seed: may be traced; None: that of the config.
  """
  key = jax.random.key(config.seed if seed is None else seed)
  example = jax.tree.map(jnp.asarray, example)
  fresh = model.init({"params": key}, example, key=key)["params"]
  params = fresh if params is None else trees.overlay(fresh, params, "init")
  ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema else None
  return State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema=ema,
    opt_state=optimizer.init(params),
    key=jax.random.key_data(key),
  )


def make_step(
  config: Config,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  teacher: nn.Module | None = None,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
  """`(state, batch, teacher_params) -> (state, metrics)`, for jit."""
  task, rules = config.task, config.optimizer
  rate = optim.learning_rate(rules, config.steps)

  def loss(params, batch, key, teacher_params):
    known = None
    if teacher is not None:
      logits, _ = teacher.apply(
        {"params": teacher_params}, task.inputs(batch, teacher), key=key
      )
      known = jax.lax.stop_gradient(logits)
    return task.loss(model, params, batch, key, known)

  def step(state: State, batch, teacher_params=None):
    key = jax.random.wrap_key_data(state.key)
    key = jax.random.fold_in(key, state.step)
    batch = task.prepare(batch, config.data, key)
    grads, metrics = accumulate(
      jax.grad(loss, has_aux=True),
      rules.accumulate,
      state.params,
      batch,
      key,
      teacher_params,
    )
    grads = optim.without_frozen(rules, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if rules.ema is not None:
      # Young averages forget faster, or they would remember the start.
      decay = jnp.minimum(rules.ema, (1 + state.step) / (10 + state.step))
      ema = optax.incremental_update(params, ema, 1 - decay)
    metrics["grad_norm"] = optax.tree.norm(grads)
    metrics["learning_rate"] = jnp.asarray(rate(state.step))
    return State(state.step + 1, params, ema, opt_state, state.key), metrics

  return step


def accumulate(grad_fn, parts: int, params, batch, key, *rest):
  """Gradient and metrics of a batch, processed in `parts` equal parts.

  Row i goes to part i mod `parts`, so that every device has its share of
  every part and no row moves.
  """
  if parts == 1:
    return grad_fn(params, batch, key, *rest)
  cut = jax.tree.map(
    lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
  )

  def one(total, part):
    i, batch = part
    out = grad_fn(params, batch, jax.random.fold_in(key, i), *rest)
    return jax.tree.map(jnp.add, total, out), None

  first = jax.tree.map(lambda x: x[0], cut)
  shapes = jax.eval_shape(grad_fn, params, first, key, *rest)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total, _ = jax.lax.scan(one, zeros, (jnp.arange(parts), cut))
  return jax.tree.map(lambda x: x / parts, total)
