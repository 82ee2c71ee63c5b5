"""Schedules and update rules, out of optax's parts."""

import dataclasses
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments.training import trees


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """Schedule and update rule.

  Attributes:
    name: "adamw", "lamb" or "sgd" (Nesterov momentum 0.9).
    lr: peak learning rate, reached after `warmup` steps.
    warmup: steps in which the learning rate grows from 0.
    schedule: what follows until the last step.
    weight_decay: on tensors of two or more axes; decoupled.
    b1, b2: decay of the running means of the gradient and of its square.
    clip: largest global norm of the gradient; None: no limit.
    accumulate: number of parts that a batch is processed in.
    ema: decay of the average of parameters that is evaluated; None: none.
    freeze: parameters whose path (`encoder/block_0/...`) matches one of these
      regular expressions stay as they are.
  """

  name: Literal["adamw", "lamb", "sgd"] = "adamw"
  lr: float = 1e-3
  warmup: int = 0
  schedule: Literal["cosine", "linear", "constant"] = "cosine"
  weight_decay: float = 0.05
  clip: float | None = 1.0
  b1: float = 0.9
  b2: float = 0.999
  accumulate: int = 1
  ema: float | None = None
  freeze: tuple[str, ...] = ()

  def __post_init__(self):
    if self.lr <= 0:
      raise ValueError(f"lr={self.lr}: must be positive")
    for name in ("warmup", "weight_decay"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}={getattr(self, name)}: must be 0 or more")
    for name in ("b1", "b2"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be in [0, 1)")
    if self.clip is not None and self.clip <= 0:
      raise ValueError(f"clip={self.clip}: must be positive, or None")
    for pattern in self.freeze:
      try:
        re.compile(pattern)
      except re.error as error:
        raise ValueError(f"freeze={pattern!r}: {error}") from error
    if self.accumulate < 1:
      raise ValueError(f"accumulate={self.accumulate}: must be 1 or more")
    if self.ema is not None and not 0 < self.ema < 1:
      raise ValueError(f"ema={self.ema}: must be in (0, 1)")


def learning_rate(config: Optimizer, steps: int) -> optax.Schedule:
  """Linear warm-up to the peak, then the schedule, by optimiser step."""
  rest = max(steps - config.warmup, 1)
  after = {
    "cosine": optax.cosine_decay_schedule(config.lr, rest),
    "linear": optax.linear_schedule(config.lr, 0.0, rest),
    "constant": optax.constant_schedule(config.lr),
  }[config.schedule]
  if not config.warmup:
    return after
  warm = optax.linear_schedule(0.0, config.lr, config.warmup)
  return optax.join_schedules([warm, after], [config.warmup])


def build(config: Optimizer, steps: int) -> optax.GradientTransformation:
  """The optimiser; frozen parameters get no state and no update."""
  rate = learning_rate(config, steps)

  def decay(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)

  update = {
    "adamw": lambda: optax.adamw(
      rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decay
    ),
    "lamb": lambda: optax.lamb(
      rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=decay
    ),
    "sgd": lambda: optax.chain(
      optax.add_decayed_weights(config.weight_decay, decay),
      optax.sgd(rate, 0.9, nesterov=True),
    ),
  }[config.name]()
  if config.clip is not None:
    update = optax.chain(optax.clip_by_global_norm(config.clip), update)
  if not config.freeze:
    return update

  def labels(params):
    held = frozen(config, params)
    return jax.tree.map(lambda f: "freeze" if f else "train", held)

  return optax.partition(
    {"train": update, "freeze": optax.set_to_zero()}, labels
  )


def frozen(config: Optimizer, params: Any) -> Any:
  """True for every parameter that stays as it is.

  Raises:
    ValueError: a pattern that matches no parameter.
  """
  return trees.matching(params, config.freeze, "optimizer.freeze")


def without_frozen(config: Optimizer, grads: Any) -> Any:
  """Zeros for frozen parameters, whose gradients are then not computed."""
  if not config.freeze:
    return grads
  held = frozen(config, grads)
  return jax.tree.map(lambda f, g: jnp.zeros_like(g) if f else g, held, grads)
