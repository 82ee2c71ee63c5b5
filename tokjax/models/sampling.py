"""The next token from its logits: greedy, temperature, top-k, top-p."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How the next token is drawn.

  The filters act one after the other, as in `transformers`: temperature,
  top-k, top-p.

  Attributes:
    temperature: logits are divided by it; 0: the largest logit, no key needed.
    top_k: only the k largest logits; those equal to the k-th stay. None: all.
    top_p: the fewest most probable tokens with a total probability of at least
      this.
  """

  temperature: float = 0.0
  top_k: int | None = None
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise ValueError(
        f"temperature={self.temperature}: must be a finite number, 0 or more"
      )
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(f"top_k={self.top_k}: must be 1 or more")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p={self.top_p}: must be in (0, 1]")

  def allowed(self, logits: Float[Array, "v"]) -> Bool[Array, "v"]:
    """The tokens that can be drawn."""
    if self.temperature == 0:
      return logits == logits.max()
    logits = logits / self.temperature
    keep = jnp.ones(logits.shape, bool)
    if self.top_k is not None and self.top_k < logits.size:
      least = jax.lax.top_k(logits, self.top_k)[0][-1]
      keep = logits >= least
    if self.top_p < 1:
      share = jax.nn.softmax(jnp.where(keep, logits, -jnp.inf))
      order = jnp.argsort(-share)
      # A token stays if those before it do not reach top_p.
      before = jnp.cumsum(share[order]) - share[order]
      keep &= jnp.zeros_like(keep).at[order].set(before < self.top_p)
    return keep

  def __call__(
    self, logits: Float[Array, "v"], key: PRNGKeyArray | None = None
  ) -> Int[Array, ""]:
    """A token of one example.

    Raises:
      ValueError: no key, and the temperature is not 0.
    """
    if self.temperature == 0:
      return jnp.argmax(logits)
    if key is None:
      raise ValueError(
        f"temperature={self.temperature}: pass key=; without one only"
        " temperature=0 can be used"
      )
    logits = jnp.where(self.allowed(logits), logits, -jnp.inf)
    return jax.random.categorical(key, logits / self.temperature)
