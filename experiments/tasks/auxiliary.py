"""Losses that recipes add to a task's own.

A recipe declares them (`Slots.losses`) or a config does (`task.auxiliary`).
Each is a hashable function of a `View` with a `name` and a `weight`; the loop
adds `weight * loss(view)` and logs the loss under its name.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from tokjax.losses import Budget, Consistency, Diversity, Ratio
from tokjax.slots import Slots


@dataclasses.dataclass(frozen=True)
class View:
  """What an auxiliary loss sees.

  Attributes:
    model, params, inputs, key: to call the model again.
    target: distribution over classes, `[b, classes]`.
    logits, out: what the model returned, see its docstring; out["sown"] is
      what its modules sowed into the collection "losses".
  """

  model: nn.Module
  params: Any
  inputs: Any
  target: jax.Array
  key: jax.Array
  logits: jax.Array
  out: dict[str, Any]

  def again(self, slots: Slots) -> tuple[jax.Array, dict[str, Any]]:
    """The same parameters and inputs through other slots."""
    return self.model.clone(slots=slots).apply(
      {"params": self.params}, self.inputs, key=self.key, train=True
    )


AUXILIARY = {
  loss.name: loss for loss in (Ratio, Budget, Consistency, Diversity)
}


def total(losses: tuple[Any, ...], view: View) -> tuple[jax.Array, dict]:
  """Weighted sum, and every loss by name."""
  values = {loss.name: loss(view) for loss in losses}
  if len(values) < len(losses):
    raise ValueError(f"two auxiliary losses of one name in {losses}")
  return sum(loss.weight * values[loss.name] for loss in losses), values
