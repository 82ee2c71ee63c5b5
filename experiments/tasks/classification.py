"""Image classification: batch, loss, metrics, evaluation."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import typed
from experiments.tasks import auxiliary
from experiments.tasks.distillation import distance

Auxiliary = Annotated[Any, typed.OneOf(auxiliary.AUXILIARY)]
Batch = dict[str, Any]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Classification:
  """Cross entropy with label smoothing, mixup, a teacher, auxiliary losses.

  A batch holds "image" `[b, height, width, c]` and "label" `[b]` or, once
  prepared, `[b, classes]`.

  Attributes:
    label_smoothing: probability mass given to all classes evenly.
    mixup: parameter of the Beta distribution; 0: none.
    distill: weight of the teacher's answers against the labels.
    temperature: that both answers are divided by; None: the teacher's best
      class counts as the label (DeiT's hard distillation).
    auxiliary: further losses, besides those of the recipe.
  """

  label_smoothing: float = 0.0
  mixup: float = 0.0
  distill: float = 0.5
  temperature: float | None = 1.0
  auxiliary: tuple[Auxiliary, ...] = ()

  unit = "images"

  def __post_init__(self):
    for name in ("label_smoothing", "distill"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be in [0, 1]")
    if self.mixup < 0:
      raise ValueError(f"mixup={self.mixup}: must be 0 or more")
    if self.temperature is not None and self.temperature <= 0:
      raise ValueError(f"temperature={self.temperature}: must be positive")

  def inputs(self, batch: Batch) -> jax.Array:
    """What the model is called with."""
    return batch["image"]

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

  def loss(
    self,
    model: nn.Module,
    params: Any,
    batch: Batch,
    key: jax.Array,
    teacher: jax.Array | None = None,
  ) -> tuple[jax.Array, Metrics]:
    """Loss and metrics of a prepared batch, means over its rows.

    Args:
      teacher: logits of the teacher on the same batch, `[b, classes]`.
    """
    images, target = batch["image"], batch["label"]
    (logits, out), sown = model.apply(
      {"params": params}, images, key=key, train=True, mutable=["losses"]
    )
    out = {**out, "sown": sown.get("losses", {})}
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy(logits, target).mean()
    hit = logits.argmax(-1) == target.argmax(-1)
    metrics = {"accuracy": hit.mean()}
    if teacher is not None:
      metrics["distill"] = distance(logits, teacher, self.temperature)
      loss = (1 - self.distill) * loss + self.distill * metrics["distill"]
    if losses := (*model.slots.losses, *self.auxiliary):
      view = auxiliary.View(model, params, images, target, key, logits, out)
      extra, values = auxiliary.total(losses, view)
      loss, metrics = loss + extra, {**metrics, **values}
    return loss, {"loss": loss, **metrics}

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
