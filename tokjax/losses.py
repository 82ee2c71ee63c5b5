"""What learned recipes add to training: soft decisions and auxiliary losses.

An auxiliary loss is a frozen dataclass with a `name` and a `weight`; called
with a `View` of a training step it returns a scalar. A recipe declares its own
in `Slots.losses`; the training loop adds their `total` to the loss of
the task.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from tokjax.signals import Attention, Block, Rows
from tokjax.slots import Slots


@dataclasses.dataclass(frozen=True)
class View:
  """What an auxiliary loss sees of a training step.

  Attributes:
    model, params, inputs, key: to call the model again.
    target: distribution over classes, `[..., classes]`; zero where nothing is
      asked.
    logits, out: what the model returned, see its docstring; out["sown"] is
      what its modules sowed into the collection "losses".
  """

  model: Any
  params: Any
  inputs: Any
  target: Any
  key: Any
  logits: Any
  out: dict[str, Any]

  def again(self, slots: Any) -> tuple[Any, dict[str, Any]]:
    """The same parameters and inputs through other slots."""
    return self.model.clone(slots=slots).apply(
      {"params": self.params}, self.inputs, key=self.key, train=True
    )

  def given(self, name: str, loss: str) -> Any:
    """What the model returned as `out[name]`.

    Raises:
      ValueError: nothing; `loss` is the one that needs it.
    """
    found = self.out.get(name)
    if found is None or isinstance(found, list | tuple) and not found:
      raise ValueError(
        f"auxiliary loss {loss!r}: recipe {self.model.slots.name!r} makes the"
        f" model return no out[{name!r}], which this loss needs"
      )
    return found


def total(
  losses: Sequence[Any], view: View
) -> tuple[Any, dict[str, Any]]:
  """Weighted sum of auxiliary losses, and every one by name.

  Raises:
    ValueError: two losses of one name, or one that needs what the model does
      not return.
  """
  values = {loss.name: loss(view) for loss in losses}
  if len(values) < len(losses):
    raise ValueError(f"two auxiliary losses of one name in {tuple(losses)}")
  return sum(loss.weight * values[loss.name] for loss in losses), values


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


def sink_decorrelation(
  hidden: Float[Array, "l b n d"], valid: Bool[Array, "b n"]
) -> Float[Array, ""]:
  """How alike hidden states are to that of the first token, in [0, 1].

  Squared cosine, a mean over real tokens of all examples but the first ones.
  Lowers attention sinks and massive activations of a fine-tuned model. For
  audio-visual speech (Anand et al., 2025), with a factor of 10000 on it.
  Checked against umbertocappellazzo/Llama-AVSR: models/modeling_AVSRLLM.py
  (410842d), run next to this on the same states. Deviation: padding does not
  count.

  Args:
    hidden: of the tokens that are no output, the first token first: what goes
      into every block but the first. `Slots(collect=(Hidden(),))` gives the
      inputs of all blocks.
    valid: real ones of them.

  Raises:
    ValueError: there is no token but the first.
  """
  if hidden.shape[2] < 2:
    raise ValueError(
      f"hidden has {hidden.shape[2]} tokens: must be two or more"
    )
  first, rest = hidden[:, :, :1], hidden[:, :, 1:]
  rest = jnp.where(valid[None, :, 1:, None], rest, 0.0)
  norm = _length(first) * _length(rest)
  cosine = (first * rest).sum(axis=-1) / jnp.where(norm > 0, norm, 1.0)
  real = valid[None, :, 1:]
  square = jnp.where(real, jnp.square(cosine), 0.0).sum(axis=(1, 2))
  return (square / jnp.maximum(real.sum(), 1)).mean()


def _length(x: Float[Array, "*s n"]) -> Float[Array, "*s"]:
  """Euclidean norm whose gradient at zero is zero instead of NaN."""
  square = jnp.sum(jnp.square(x), axis=-1)
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0.0)


@dataclasses.dataclass(frozen=True)
class Ratio:
  """Squared distance of each image's kept share from the stage's target.

  DynamicViT's ratio loss, averaged over images and stages (checked against
  losses.py with dynamic=False, which main.py uses).

  Attributes:
    targets: one a stage; None: what the schedule keeps.
    weight: factor of the loss.
  """

  targets: tuple[float, ...] | None = None
  weight: float = 2.0
  name = "ratio"

  def __call__(self, view: View) -> Array:
    kept = view.given("kept", self.name)
    targets = self.targets
    if targets is None:
      targets = view.given("scheduled", self.name)
    if len(kept) != len(targets):
      raise ValueError(
        f"auxiliary ratio: {len(targets)} targets for {len(kept)} stages"
      )
    gap = jnp.stack(kept) - jnp.asarray(targets)[:, None]
    return jnp.mean(jnp.square(gap))


@dataclasses.dataclass(frozen=True)
class Budget:
  """How far the mean kept share over all stages lies above a budget.

  Attributes:
    budget: share that may be kept.
    weight: factor of the loss.
  """

  budget: float
  weight: float = 1.0
  name = "budget"

  def __call__(self, view: View) -> Array:
    mean = jnp.stack(view.given("kept", self.name)).mean()
    return jax.nn.relu(mean - self.budget)


@dataclasses.dataclass(frozen=True)
class Consistency:
  """Distance of the pooled features from those of another reduction.

  Mean square over features (checked against MCTF's engine.py, models/deit.py,
  whose other pass removes a random r of 0 to 7 tokens in each block; shapes
  are static here, so that it removes what `keep` says).

  Attributes:
    keep: of the other pass, with the same recipe; None: no reduction.
    confidence: the mean is over examples whose true class the model gives
      more than this probability; zero where there is none (MCTF: 0.4).
    detach: the other pass is a fixed target.
    supervise: weight of the other pass's own cross entropy (MCTF: 1).
    weight: factor of the loss.
  """

  keep: float | None = None
  weight: float = 1.0
  confidence: float = 0.0
  detach: bool = False
  supervise: float = 0.0
  name = "consistency"

  def __call__(self, view: View) -> Array:
    slots = Slots(name="none")
    if self.keep is not None:
      slots = view.model.slots.with_keep(self.keep)
    logits, other = view.again(slots)
    pooled = view.given("pooled", self.name).astype(jnp.float32)
    target = other["pooled"].astype(jnp.float32)
    if self.detach:
      target = jax.lax.stop_gradient(target)
    gap = jnp.square(pooled - target)
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

  The recipe has to collect the signal "attention".

  Attributes:
    factor: see `attention_diversity`.
    weight: factor of the loss.
  """

  factor: float = 2.0
  weight: float = 1.0
  name = "diversity"

  def __call__(self, view: View) -> Array:
    one = lambda a: attention_diversity(a, self.factor)
    collected = view.given("signals", self.name)
    layers = [jax.vmap(one)(s.of(Attention)).mean() for s in collected]
    return jnp.stack(layers).mean()


@dataclasses.dataclass(frozen=True)
class Sown:
  """The mean of what modules sowed into the collection "losses" as `name`."""

  name: str
  weight: float = 1.0

  def __call__(self, view: View) -> Array:
    return jnp.stack(_sown(view, self.name, self.name)).mean()


def _sown(view: View, name: str, loss: str) -> list[Array]:
  """What modules sowed into the collection "losses" as `name`.

  Raises:
    ValueError: nothing, of the loss that is named.
  """
  flat = jax.tree_util.tree_flatten_with_path(view.out["sown"])[0]
  place = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  found = [x for path, x in flat if name in place(path).split("/")]
  if not found:
    raise ValueError(
      f"auxiliary {loss!r}: no module of recipe {view.model.slots.name!r} sows"
      f" {'such a loss' if name == loss else name}"
    )
  return found


@dataclasses.dataclass(frozen=True)
class Guided:
  """Divergence of a module's scores from the attention of a deeper block.

  The attention to the tokens that have scores, as a distribution over them,
  against the softmax of the scores: CoViPAL's first stage (weak: from its
  abstract, which does not say how the two are compared). The recipe has to
  collect the attention; a mean over examples and modules.

  Attributes:
    block: that guides, as a number or a fraction of the depth.
    weight: factor of the loss.
  """

  block: int | float = 0.5
  weight: float = 1.0
  name = "guided"

  def __call__(self, view: View) -> Array:
    signals = view.given("signals", self.name)
    at = Block(self.block)
    index = Rows(layer=at).at(0, len(signals))
    if not 0 <= index < len(signals):
      raise ValueError(
        f"auxiliary {self.name!r}: block={self.block} of {len(signals)} blocks"
      )
    seen = jax.lax.stop_gradient(signals[index].of(Rows))
    found = _sown(view, "scores", self.name)
    return jnp.stack([_divergence(seen, score) for score in found]).mean()


def _divergence(seen: Float[Array, "b n"], score: Float[Array, "b n"]) -> Array:
  """Mean over examples of the divergence of softmax(score) from `seen`."""
  free = jnp.isfinite(score)
  mass = jnp.where(free, seen.astype(jnp.float32), 0.0)
  total = mass.sum(axis=-1, keepdims=True)
  share = mass / jnp.where(total > 0, total, 1.0)
  log_q = jax.nn.log_softmax(jnp.where(free, score, -1e9), axis=-1)
  log_p = jnp.log(jnp.maximum(share, 1e-9))
  return jnp.where(share > 0, share * (log_p - log_q), 0.0).sum(axis=-1).mean()


@dataclasses.dataclass(frozen=True)
class Told:
  """A loss that the attention of layers leaves as `name`, a sum over layers."""

  name: str
  weight: float = 1.0

  def __call__(self, view: View) -> Array:
    told = view.given("losses", self.name)
    if self.name not in told:
      raise ValueError(
        f"auxiliary {self.name!r}: no layer of recipe"
        f" {view.model.slots.name!r} leaves such a loss"
      )
    return jnp.stack(told[self.name]).sum()


@dataclasses.dataclass(frozen=True)
class Drafting:
  """How far what a draft guesses is from what the model makes later (FLASH).

  Smooth L1 of features, a mean over their entries, and cross entropy with the
  distribution that the head makes of the true ones; means over the guesses that
  count.

  Attributes:
    features, tokens: factors of the two.
    weight: factor of the loss.
  """

  features: float = 1.0
  tokens: float = 0.1
  weight: float = 1.0
  name = "drafting"

  def __call__(self, view: View) -> Array:
    said = view.given("draft", self.name)
    guess, true = said.rows.features, said.rows.target
    gap = jnp.abs(guess - true)
    near = jnp.where(gap < 1, 0.5 * gap * gap, gap - 0.5).mean(axis=-1)
    right = jax.nn.softmax(said.target)
    cross = -(right * jax.nn.log_softmax(said.logits)).sum(axis=-1)
    loss = self.features * near + self.tokens * cross
    weight = said.rows.weight
    return (loss * weight).sum() / jnp.maximum(weight.sum(), 1)
