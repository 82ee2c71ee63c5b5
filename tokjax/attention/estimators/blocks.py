"""What the estimators share: their argument, blocks, visibility, shares."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import layout as layouts


def cut(x: Float[Array, "*s n d"], block: int) -> Float[Array, "*s j b d"]:
  """Rows in blocks of `block`, the last one filled up with zeros, float32."""
  x = x.astype(jnp.float32)
  fill = [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % block), (0, 0)]
  x = jnp.pad(x, fill)
  return x.reshape(*x.shape[:-2], -1, block, x.shape[-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocked:
  """Queries and keys of one example, to be judged by blocks.

  Attributes:
    q: `[h, m, d]`.
    k: `[g, n, d]`, g dividing h (grouped-query heads).
    block_q, block_k: tokens of a block.
    bias: `[n]`, added to the logits of a key (log size: proportional
      attention).
    q_mask, k_mask: `[m]` and `[n]`; tokens where it is False take no part.
    pattern: who may see whom.
  """

  q: Float[Array, "h m d"]
  k: Float[Array, "g n d"]
  block_q: int = dataclasses.field(metadata={"static": True})
  block_k: int = dataclasses.field(metadata={"static": True})
  bias: Float[Array, "n"] | None = None
  q_mask: Bool[Array, "m"] | None = None
  k_mask: Bool[Array, "n"] | None = None
  pattern: layouts.Pattern = dataclasses.field(
    default=layouts.Full(), metadata={"static": True}
  )

  def asked(self, size: int) -> Bool[Array, "i b"]:
    """Which queries exist and are not masked, in blocks of `size`."""
    return real(self.q_mask, self.q.shape[1], size)

  def there(self, size: int) -> Bool[Array, "j b"]:
    """Which keys exist and are not masked, in blocks of `size`."""
    return real(self.k_mask, self.k.shape[1], size)

  def key_logits(self, size: int) -> Float[Array, "j b"]:
    """What each key adds to its logits: its bias, or -inf if it is hidden."""
    n = self.k.shape[1]
    bias = jnp.zeros((n,)) if self.bias is None else self.bias
    bias = jnp.pad(bias.astype(jnp.float32), (0, -n % size)).reshape(-1, size)
    return jnp.where(self.there(size), bias, -jnp.inf)


def real(
  mask: Bool[Array, "n"] | None, n: int, block: int
) -> Bool[Array, "j b"]:
  """Which tokens of each block exist and are not masked."""
  mask = jnp.ones((n,), bool) if mask is None else mask
  return jnp.pad(mask, (0, -n % block)).reshape(-1, block)


def log_sum(x: Float[Array, "*s n"]) -> Float[Array, "*s"]:
  """Log-sum-exp over the last axis; -inf where every entry is."""
  return jax.nn.logsumexp(x, axis=-1)


def log(mass: Float[Array, "*s"]) -> Float[Array, "*s"]:
  """Logarithm of a mass, -inf for none."""
  return jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1.0)), -jnp.inf)


def softmax(logits: Float[Array, "*s n"]) -> Float[Array, "*s n"]:
  """Softmax over the last axis; zeros where every logit is -inf."""
  return jax.nn.softmax(logits, axis=-1, where=logits > -jnp.inf)


def share(
  estimate: Float[Array, "h i j"], visible: Bool[Array, "#h i j"]
) -> Float[Array, "h i j"]:
  """Estimates as shares of a query block's attention, which sum to 1.

  Blocks that are not `visible` have none; a row with nothing to see is 0.
  """
  return softmax(jnp.where(visible, estimate, -jnp.inf))


def seen(
  pattern: layouts.Pattern,
  h: Int[Array, ""],
  q: Int[Array, "m"],
  k: Int[Array, "n"],
) -> Bool[Array, "m n"]:
  """Which keys the queries at these positions may see in head h."""
  shown = pattern(h, q[:, None], k[None, :])
  return jnp.broadcast_to(shown, (q.shape[0], k.shape[0]))


def each_head(function, q: Float[Array, "h *m"], k: Float[Array, "g *n"]):
  """`function(h, q of the head, k of its group)`, one head after the other.

  What a head needs on the way is gone before the next one begins.
  """
  heads, times = q.shape[0], q.shape[0] // k.shape[0]
  one = lambda h: function(h, q[h], k[h // times])
  return jax.lax.map(one, jnp.arange(heads, dtype=jnp.int32))


def repeat(x: Float[Array, "g *s"], heads: int) -> Float[Array, "h *s"]:
  """Key heads as often as query heads share them."""
  return jnp.repeat(x, heads // x.shape[0], axis=0)
