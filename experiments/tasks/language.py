"""Language modelling: predict every next token, or those that are asked for."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tasks.distillation import distance

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Language:
  """Cross entropy of the next token.

  A batch holds "tokens" `[b, n + 1]`: inputs are all but the last, targets
  all but the first. Or it holds "tokens" and "target" `[b, n]`, where a target
  of -1 is not asked for. The model maps `[b, n]` to logits
  `[b, n, vocabulary]`.

  Attributes:
    distill, temperature: see `Classification`.
  """

  distill: float = 0.5
  temperature: float | None = 1.0

  unit = "tokens"

  def __post_init__(self):
    if not 0 <= self.distill <= 1:
      raise ValueError(f"distill={self.distill}: must be in [0, 1]")
    if self.temperature is not None and self.temperature <= 0:
      raise ValueError(f"temperature={self.temperature}: must be positive")

  def inputs(self, batch: Batch) -> jax.Array:
    """What the model is called with."""
    return batch["tokens"] if "target" in batch else batch["tokens"][:, :-1]

  def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What is to be said `[b, n]`, and where, as weights 0 or 1."""
    target = batch.get("target", batch["tokens"][:, 1:])
    target = jnp.asarray(target)
    return jnp.maximum(target, 0), (target >= 0).astype(jnp.float32)

  def units(self, data: Any) -> int:
    """How many tokens an example is, for the throughput."""
    return data.length

  def prepare(self, batch: Batch, data: Any, key: jax.Array) -> Batch:
    """The batch as it is."""
    del data, key
    return batch

  def loss(
    self,
    model: nn.Module,
    params: Any,
    batch: Batch,
    key: jax.Array,
    teacher: jax.Array | None = None,
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss in nats a token, and metrics, means over the batch."""
    logits, _ = model.apply(
      {"params": params}, self.inputs(batch), key=key, train=True
    )
    logits, (target, asked) = logits.astype(jnp.float32), self.targets(batch)
    mean = lambda x: (x * asked).sum() / jnp.maximum(asked.sum(), 1)
    loss = mean(_cross_entropy(logits, target))
    metrics = {"accuracy": mean(logits.argmax(-1) == target)}
    metrics["bits_per_token"] = loss / math.log(2)
    if teacher is not None:
      metrics["distill"] = distance(logits, teacher, self.temperature)
      loss = (1 - self.distill) * loss + self.distill * metrics["distill"]
    return loss, {"loss": loss, **metrics}

  def evaluate(
    self, model: nn.Module, params: Any, batches: Iterable[Batch]
  ) -> dict[str, float]:
    """Loss, accuracy and bits a token over batches with "weight" a row."""
    sums = [_count(self, model, params, batch) for batch in batches]
    if not sums:
      raise ValueError("no batch to evaluate on")
    total = {k: float(np.sum([s[k] for s in sums])) for k in sums[0]}
    count = total.pop("count")
    means = {name: value / count for name, value in total.items()}
    return {**means, "bits_per_token": means["loss"] / math.log(2)}


_cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@functools.partial(jax.jit, static_argnums=(0, 1))
def _count(task, model, params, batch):
  logits, _ = model.apply({"params": params}, task.inputs(batch))
  logits, (target, asked) = logits.astype(jnp.float32), task.targets(batch)
  weight = batch["weight"][:, None] * asked
  return {
    "loss": (_cross_entropy(logits, target) * weight).sum(),
    "accuracy": ((logits.argmax(-1) == target) * weight).sum(),
    "count": weight.sum(),
  }
