"""What learned recipes add to training: soft decisions and auxiliary losses.

An auxiliary loss is a frozen dataclass with a `name` and a `weight`; called
with a view of a training step (`model`, `params`, `inputs`, `target`, `key`,
`logits`, `out`, `again(slots)`) it returns a scalar. A recipe declares its own
in `Slots.losses`; `experiments.tasks` adds `weight * loss(view)`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from tokjax.signals import Attention


def straight_through(
  hard: Float[Array, "*s"], soft: Float[Array, "*s"]
) -> Float[Array, "*s"]:
  """The value of `hard` with the gradient of `soft`."""
  return soft + jax.lax.stop_gradient(hard - soft)


def gumbel_keep(
  key: PRNGKeyArray, logits: Float[Array, "n 2"], temperature: float = 1.0
) -> Float[Array, "n"]:
  """Keep bits drawn from (keep, drop) logits, with straight-through gradient.

  Hard Gumbel-softmax: the bit is that of the perturbed maximum, the gradient
  that of the softmax.
  """
  noise = jax.random.gumbel(key, logits.shape, logits.dtype)
  soft = jax.nn.softmax((logits + noise) / temperature, axis=-1)[..., 0]
  return straight_through((soft > 0.5).astype(soft.dtype), soft)


def attention_diversity(
  attention: Float[Array, "h n n"], factor: float = 2.0
) -> Float[Array, ""]:
  """How alike the rows of an attention map are, in [0, 1].

  Mean cosine of every row with the mean row, after entries up to factor / n
  are dropped from both (the mean is taken before). TAP + ADL (Guo et al.,
  2023; checked against TAPADL_FAN/main.py).
  """
  mean_map = attention.mean(axis=0)
  threshold = factor / mean_map.shape[-1]
  strong = lambda x: jnp.where(x > threshold, x, 0.0)
  rows, centre = strong(mean_map), strong(mean_map.mean(axis=0))
  dot = rows @ centre
  norm = _length(rows) * _length(centre)
  return jnp.where(norm > 0, dot / jnp.where(norm > 0, norm, 1.0), 0.0).mean()


def _length(x: Float[Array, "*s n"]) -> Float[Array, "*s"]:
  """Euclidean norm whose gradient at zero is zero instead of NaN."""
  square = jnp.sum(jnp.square(x), axis=-1)
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0.0)


def kept_shares(view) -> tuple[Array, ...]:
  """Differentiable share of tokens that each stage kept, `[b]` each.

  Raises:
    ValueError: the model's recipe gates nothing.
  """
  kept = view.out.get("kept")
  if not kept:
    raise ValueError(
      f"recipe {view.model.slots.name!r} has no learned gates: its model"
      " returns no out['kept'], which this auxiliary loss needs"
    )
  return tuple(kept)


@dataclasses.dataclass(frozen=True)
class Ratio:
  """Squared distance of each image's kept share from the stage's target.

  DynamicViT's ratio loss, averaged over images and stages (checked against
  losses.py with dynamic=False, which main.py uses).

  Attributes:
    targets: one a stage; None: what the schedule keeps.
  """

  targets: tuple[float, ...] | None = None
  weight: float = 2.0
  name = "ratio"

  def __call__(self, view) -> Array:
    kept = kept_shares(view)
    targets = self.targets
    if targets is None:
      targets = view.out["scheduled"]
    if len(kept) != len(targets):
      raise ValueError(
        f"auxiliary ratio: {len(targets)} targets for {len(kept)} stages"
      )
    gap = jnp.stack(kept) - jnp.asarray(targets)[:, None]
    return jnp.mean(jnp.square(gap))


@dataclasses.dataclass(frozen=True)
class Budget:
  """How far the mean kept share over all stages lies above a budget."""

  budget: float
  weight: float = 1.0
  name = "budget"

  def __call__(self, view) -> Array:
    mean = jnp.stack(kept_shares(view)).mean()
    return jax.nn.relu(mean - self.budget)


@dataclasses.dataclass(frozen=True)
class Consistency:
  """Distance of the pooled features from those of another reduction.

  Mean square over features (checked against MCTF's engine.py, models/deit.py,
  whose other pass removes a random r of 0 to 7 tokens a block; shapes are
  static here, so that it removes what `keep` says).

  Attributes:
    keep: of the other pass, with the same recipe; None: no reduction.
    confidence: the mean is over examples whose true class the model gives
      more than this probability; zero where there is none (MCTF: 0.4).
    detach: the other pass is a fixed target.
    supervise: weight of the other pass's own cross entropy (MCTF: 1).
  """

  keep: float | None = None
  weight: float = 1.0
  confidence: float = 0.0
  detach: bool = False
  supervise: float = 0.0
  name = "consistency"

  def __call__(self, view) -> Array:
    from tokjax.slots import Slots

    slots = Slots(name="none")
    if self.keep is not None:
      slots = view.model.slots.with_keep(self.keep)
    logits, other = view.again(slots)
    target = other["pooled"].astype(jnp.float32)
    if self.detach:
      target = jax.lax.stop_gradient(target)
    gap = jnp.square(view.out["pooled"].astype(jnp.float32) - target)
    counts = jnp.ones(gap.shape[0])
    if self.confidence:
      sure = jnp.sum(jax.nn.softmax(view.logits) * view.target, axis=-1)
      counts = (sure > self.confidence).astype(jnp.float32)
    loss = jnp.sum(gap.mean(axis=-1) * counts) / jnp.maximum(counts.sum(), 1)
    if self.supervise:
      own = -jnp.sum(jax.nn.log_softmax(logits) * view.target, axis=-1).mean()
      loss = loss + self.supervise * own / self.weight
    return loss


@dataclasses.dataclass(frozen=True)
class Diversity:
  """`attention_diversity`, averaged over layers and the batch.

  The recipe has to collect `Attention`.
  """

  factor: float = 2.0
  weight: float = 1.0
  name = "diversity"

  def __call__(self, view) -> Array:
    one = lambda a: attention_diversity(a, self.factor)
    maps = [answers.of(Attention) for answers in view.out["signals"]]
    layers = [jax.vmap(one)(attention).mean() for attention in maps]
    return jnp.stack(layers).mean()


@dataclasses.dataclass(frozen=True)
class Sown:
  """The mean of what modules sowed into the collection "losses" as `name`."""

  name: str
  weight: float = 1.0

  def __call__(self, view) -> Array:
    flat = jax.tree_util.tree_flatten_with_path(view.out["sown"])[0]
    found = [x for path, x in flat if self.name in jax.tree_util.keystr(path)]
    if not found:
      raise ValueError(
        f"auxiliary {self.name!r}: no module of recipe"
        f" {view.model.slots.name!r} sows such a loss"
      )
    return jnp.stack(found).mean()
