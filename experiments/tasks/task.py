"""What all tasks share: the training loss, in one place.

A task says what the model is called with (`inputs`), what it is compared with
(`targets`) and what that comparison gives (`compare`). The teacher and the
auxiliary losses of recipes are added here, for every task alike.
"""

import dataclasses
from typing import Annotated, Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import typed
from experiments.tasks.distillation import distance
from tokjax import losses

AUXILIARY = {
  loss.name: loss
  for loss in (
    losses.Ratio, losses.Budget, losses.Consistency, losses.Diversity,
  )
}  # fmt: skip
Auxiliary = Annotated[Any, typed.OneOf(AUXILIARY)]
Batch = dict[str, Any]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Task:
  """Base of tasks.

  Attributes:
    distill: weight of the teacher's answers against the labels.
    temperature: that both answers are divided by; None: the teacher's best
      class counts as the label (DeiT's hard distillation).
  """

  distill: float = 0.5
  temperature: float | None = 1.0

  # What a metric of throughput counts.
  unit: ClassVar[str]
  # Losses of the config, in addition to those of the recipe; a task whose
  # config has them makes this a field.
  auxiliary: ClassVar[Any] = ()

  def __post_init__(self):
    if not 0 <= self.distill <= 1:
      raise ValueError(f"distill={self.distill}: must be in [0, 1]")
    if self.temperature is not None and not self.temperature > 0:
      raise ValueError(f"temperature={self.temperature}: must be positive")

  def inputs(self, batch: Batch, model: nn.Module) -> Any:
    """What the model is called with."""
    raise NotImplementedError

  def answers(self, logits: jax.Array, batch: Batch) -> jax.Array:
    """The logits that are compared, one for each entry of the targets."""
    del batch
    return logits

  def distribution(self, batch: Batch, classes: int) -> jax.Array:
    """The right answer to each position of the logits, `[..., classes]`.

    Zero where nothing is asked.
    """
    raise NotImplementedError

  def compare(
    self, logits: jax.Array, batch: Batch
  ) -> tuple[jax.Array, Metrics]:
    """The task's own loss and its metrics, means over the batch."""
    raise NotImplementedError

  def loss(
    self,
    model: nn.Module,
    params: Any,
    batch: Batch,
    key: jax.Array,
    teacher: jax.Array | None = None,
  ) -> tuple[jax.Array, Metrics]:
    """Loss and metrics of a prepared batch.

    Args:
      model: returns logits and a dictionary; its `slots.losses` are added.
      params: its parameters.
      batch: see the task.
      key: for what is random in the model.
      teacher: logits of the teacher on the same batch, shaped as the model's.

    Returns:
      The loss, and "loss", the task's metrics, "distill" where there is a
      teacher, and every auxiliary loss under its name.
    """
    inputs = self.inputs(batch, model)
    (logits, out), sown = model.apply(
      {"params": params}, inputs, key=key, train=True, mutable=["losses"]
    )
    logits = self.answers(logits, batch).astype(jnp.float32)
    loss, metrics = self.compare(logits, batch)
    if teacher is not None:
      teacher = self.answers(teacher, batch)
      metrics["distill"] = distance(logits, teacher, self.temperature)
      loss = (1 - self.distill) * loss + self.distill * metrics["distill"]
    if extra := (*model.slots.losses, *self.auxiliary):
      target = self.distribution(batch, logits.shape[-1])
      out = {**out, "sown": sown.get("losses", {})}
      view = losses.View(model, params, inputs, target, key, logits, out)
      added, values = losses.total(extra, view)
      if taken := sorted(metrics.keys() & values.keys()):
        raise ValueError(f"auxiliary loss {taken[0]!r}: a metric has this name")
      loss, metrics = loss + added, {**metrics, **values}
    return loss, {"loss": loss, **metrics}
