"""Dense attention, and the parts of its map that recipes ask for.

Arrays are batched: queries, keys and values `[b, h, n, k]`; `bias` is added to
the logits of every key, `[b, n]` (log sizes: proportional attention); keys
where `mask` `[b, n]` is False are invisible.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def probabilities(
  q: Float[Array, "b h m k"],
  k: Float[Array, "b h n k"],
  *,
  bias: Float[Array, "b n"] | None = None,
  mask: Bool[Array, "b n"] | None = None,
  seen: Bool[Array, "b #h m n"] | None = None,
  policy: Float[Array, "b n"] | None = None,
) -> Float[Array, "b h m n"]:
  """Softmax over keys, in float32; a query that sees no key gets zeros.

  `seen` says which keys a query sees; None: all that `mask` shows.
  With a `policy` every key counts as much as it is present, except that a
  token always sees itself (DynamicViT, checked against models/dyvit.py).
  """
  k = _without_hidden(k, mask)
  logits = jnp.einsum(
    "bhmk,bhnk->bhmn", q, k, preferred_element_type=jnp.float32
  )
  logits = logits * (q.shape[-1] ** -0.5)
  if bias is not None:
    logits = logits + bias[:, None, None, :]
  if policy is not None:
    return _policy_softmax(logits, policy, mask)
  if mask is not None:
    shown = mask[:, None, None, :]
    seen = shown if seen is None else seen & shown
  return jax.nn.softmax(logits, axis=-1, where=seen)


def _without_hidden(x, mask):
  """Keys or values with zeros where hidden: 0 * NaN would be NaN."""
  return x if mask is None else jnp.where(mask[:, None, :, None], x, 0)


def _policy_softmax(logits, policy, mask, epsilon=1e-6):
  """softmax with weights p_j + (1 - p_j) [i = j], smoothed by epsilon / n."""
  n = logits.shape[-1]
  present = policy if mask is None else jnp.where(mask, policy, 0.0)
  own = jnp.eye(n)[None]
  present = present[:, None, :] * (1 - own) + own
  if mask is not None:
    logits = jnp.where(mask[:, None, None, :], logits, -jnp.inf)
  peak = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
  peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
  weight = jnp.exp(logits - peak) * present[:, None]
  total = weight.sum(axis=-1, keepdims=True)
  return (weight + epsilon / n) / (total + epsilon)


def mix(
  weight: Float[Array, "b h m n"],
  v: Float[Array, "b h n k"],
  mask: Bool[Array, "b n"] | None = None,
) -> Float[Array, "b h m k"]:
  """Probabilities times values, in the dtype of the values.

  Where `mask` is False the probabilities are 0 and values may be anything.
  """
  v = _without_hidden(v, mask)
  return jnp.einsum("bhmn,bhnk->bhmk", weight.astype(v.dtype), v)


@dataclasses.dataclass(frozen=True)
class Dense:
  """Every query sees every key: the default of the slot."""

  def __call__(self, q, k, v, *, bias=None, mask=None, policy=None):
    weight = probabilities(q, k, bias=bias, mask=mask, policy=policy)
    return mix(weight, v, mask)


def received(
  attention: Float[Array, "b h n n"], mask: Bool[Array, "b n"] | None
) -> Float[Array, "b h n"]:
  """Column means of attention over the real queries."""
  if mask is None:
    return attention.mean(axis=2)
  seen = mask[:, None, :, None]
  total = jnp.where(seen, attention, 0.0).sum(axis=2)
  return total / jnp.maximum(mask.sum(-1), 1)[:, None, None]
