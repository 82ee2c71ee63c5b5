"""A short training run outside of the loop of `experiments.train`.

For models that are no `experiments` model: scripts that show that a mechanism
learns train them with Adam, a warm-up and a cosine.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax


def fitted(
  loss: Callable[..., jax.Array],
  params: Any,
  batches: Iterable[tuple[Any, ...]],
  *,
  steps: int,
  lr: float,
  warmup: int,
  clip: float | None = None,
) -> Any:
  """Parameters after a step on each batch.

  Args:
    loss: of parameters and a batch.
    params: to start from.
    batches: as many as `steps`.
    steps: over which the learning rate falls.
    lr: the largest learning rate, after `warmup` steps.
    warmup: see `lr`.
    clip: of the norm of gradients; None: they are taken as they are.

  Raises:
    SystemExit: with one line, for too few steps.
  """
  if steps <= warmup:
    raise SystemExit(
      f"error: steps={steps}: must be more than the {warmup} of the warm-up"
    )
  schedule = optax.warmup_cosine_decay_schedule(0, lr, warmup, steps)
  optimiser = optax.adam(schedule)
  if clip is not None:
    optimiser = optax.chain(optax.clip_by_global_norm(clip), optimiser)

  @jax.jit
  def step(params, state, *batch):
    slope = jax.grad(loss)(params, *batch)
    update, state = optimiser.update(slope, state)
    return optax.apply_updates(params, update), state

  state = jax.jit(optimiser.init)(params)
  for batch in batches:
    params, state = step(params, state, *batch)
  return params
