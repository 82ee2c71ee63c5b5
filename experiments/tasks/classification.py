"""Image classification: batch, loss, metrics, evaluation."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tasks.task import Auxiliary, Batch, Metrics, Task


@dataclasses.dataclass(frozen=True)
class Classification(Task):
  """Cross entropy with label smoothing, mixup, a teacher, auxiliary losses.

  A batch holds "image" `[b, height, width, c]` and "label" `[b]` or, once
  prepared, `[b, classes]`.

  Attributes:
    distill, temperature: see `Task`.
    label_smoothing: probability mass given to all classes evenly.
    mixup: parameter of the Beta distribution; 0: none.
    auxiliary: further losses, in addition to those of the recipe.
  """

  label_smoothing: float = 0.0
  mixup: float = 0.0
  auxiliary: tuple[Auxiliary, ...] = ()

  unit = "images"

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.label_smoothing <= 1:
      raise ValueError(
        f"label_smoothing={self.label_smoothing}: must be in [0, 1]"
      )
    if not self.mixup >= 0:
      raise ValueError(f"mixup={self.mixup}: must be 0 or more")

  def inputs(self, batch: Batch, model: nn.Module) -> jax.Array:
    """What the model is called with."""
    del model
    return batch["image"]

  def distribution(self, batch: Batch, classes: int) -> jax.Array:
    """Of a prepared batch, `[b, classes]`."""
    del classes
    return batch["label"]

  def units(self, data: Any) -> int:
    """How many images an example is, for the throughput."""
    del data
    return 1

  def prepare(self, batch: Batch, data: Any, key: jax.Array) -> Batch:
    """Labels to target distributions; mixes neighbours if asked.

    Batches are shuffled, so that a neighbour is a random partner; pairs stay
    within a shard of the batch and cost no communication.
    """
    target = jax.nn.one_hot(batch["label"], data.num_classes)
    target = optax.smooth_labels(target, self.label_smoothing)
    batch = {**batch, "label": target}
    if not self.mixup:
      return batch
    share = jax.random.beta(key, self.mixup, self.mixup)
    return {**batch, **{k: _mix(batch[k], share) for k in ("image", "label")}}

  def compare(
    self, logits: jax.Array, batch: Batch
  ) -> tuple[jax.Array, Metrics]:
    """Cross entropy, and the share of images whose best class is right."""
    target = batch["label"]
    loss = optax.softmax_cross_entropy(logits, target).mean()
    hit = logits.argmax(-1) == target.argmax(-1)
    return loss, {"accuracy": hit.mean()}

  def evaluate(
    self, model: nn.Module, params: Any, batches: Iterable[Batch]
  ) -> dict[str, float]:
    """Accuracy and loss over batches with "weight" for each row."""
    sums = [
      _count(model, params, batch, jax.random.key(i))
      for i, batch in enumerate(batches)
    ]
    if not sums:
      raise ValueError("no batch to evaluate on")
    total = {k: sum(float(s[k]) for s in sums) for k in sums[0]}
    count = total.pop("count")
    return {name: value / count for name, value in total.items()}


def logits_fn(model: nn.Module) -> Callable[..., jax.Array]:
  """`f(params, images, key=None) -> logits [b, classes]`, jit-compiled."""

  @jax.jit
  def logits(params, images, key=None):
    return model.apply({"params": params}, images, key=key)[0]

  return logits


def accuracy(
  logits: Callable[..., jax.Array],
  params: Any,
  arrays: Batch,
  batch_size: int,
  key: jax.Array | None = None,
) -> float:
  """Share of right answers over arrays; the rest of a batch is filled up."""
  images, labels = arrays["image"], arrays["label"]
  hits = 0
  for i in range(0, len(images), batch_size):
    part = images[i : i + batch_size]
    real = len(part)
    if real < batch_size:
      part = np.concatenate([part, part[:1].repeat(batch_size - real, 0)])
    answer = np.asarray(logits(params, part, key).argmax(-1))[:real]
    hits += int((answer == labels[i : i + real]).sum())
  return hits / len(images)


@functools.partial(jax.jit, static_argnums=0)
def _count(model, params, batch, key):
  logits, _ = model.apply({"params": params}, batch["image"], key=key)
  logits = logits.astype(jnp.float32)
  weight = batch["weight"]
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
  hit = logits.argmax(-1) == batch["label"]
  return {
    "accuracy": (hit * weight).sum(),
    "loss": (loss * weight).sum(),
    "count": weight.sum(),
  }


def _mix(values: jax.Array, share: jax.Array) -> jax.Array:
  pairs = values.reshape(-1, 2, *values.shape[1:])
  return (share * pairs + (1 - share) * pairs[:, ::-1]).reshape(values.shape)
