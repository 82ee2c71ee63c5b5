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

from experiments.tasks.task import Batch, Metrics, Task


@dataclasses.dataclass(frozen=True)
class Language(Task):
  """Cross entropy of the next token.

  A batch holds "tokens" `[b, n + 1]`: inputs are all but the last, targets
  all but the first. Or it holds "tokens" and "target" `[b, n]`, where a target
  of -1 is not asked for. The model maps `[b, n]` to logits
  `[b, n, vocabulary]`.
  """

  unit = "tokens"

  def inputs(self, batch: Batch, model: nn.Module) -> Any:
    """What the model is called with."""
    del model
    return batch["tokens"] if "target" in batch else batch["tokens"][:, :-1]

  def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Expected ids `[b, n]`, and weights: 0 where nothing is asked, else 1."""
    target = batch.get("target", batch["tokens"][:, 1:])
    target = jnp.asarray(target)
    return jnp.maximum(target, 0), (target >= 0).astype(jnp.float32)

  def distribution(self, batch: Batch, classes: int) -> jax.Array:
    """All mass on the expected id, `[b, n, classes]`; zero where not asked."""
    target, asked = self.targets(batch)
    return jax.nn.one_hot(target, classes) * asked[..., None]

  def units(self, data: Any) -> int:
    """How many tokens an example is, for the throughput."""
    return data.length

  def prepare(self, batch: Batch, data: Any, key: jax.Array) -> Batch:
    """The batch as it is."""
    del data, key
    return batch

  def compare(
    self, logits: jax.Array, batch: Batch
  ) -> tuple[jax.Array, Metrics]:
    """Cross entropy in nats per token, and the same in bits; accuracy."""
    target, asked = self.targets(batch)
    mean = lambda x: (x * asked).sum() / jnp.maximum(asked.sum(), 1)
    loss = mean(_cross_entropy(logits, target))
    metrics = {"accuracy": mean(logits.argmax(-1) == target)}
    return loss, {**metrics, "bits_per_token": loss / math.log(2)}

  def evaluate(
    self, model: nn.Module, params: Any, batches: Iterable[Batch]
  ) -> dict[str, float]:
    """Loss, accuracy and bits per token over batches with "weight" of rows."""
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
  # Recipes that draw do so alike in every run.
  logits, _ = model.apply(
    {"params": params}, task.inputs(batch, model), key=jax.random.key(0)
  )
  logits = task.answers(logits, batch).astype(jnp.float32)
  target, asked = task.targets(batch)
  weight = batch["weight"][:, None] * asked
  return {
    "loss": (_cross_entropy(logits, target) * weight).sum(),
    "accuracy": ((logits.argmax(-1) == target) * weight).sum(),
    "count": weight.sum(),
  }
