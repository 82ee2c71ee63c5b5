"""Joins attention over disjoint sets of keys by their log-sum-exps."""

from jax import numpy as jnp
from jaxtyping import Array, Float


def merge(
  outs: Float[Array, "*parts d"], lses: Float[Array, "*parts"], axis: int = 0
) -> tuple[Float[Array, "*rest d"], Float[Array, "*rest"]]:
  """Merges partial attention results along one axis.

  Args:
    outs: `[..., parts, ..., D]` partial outputs.
    lses: the shape of `outs` without its last axis; -inf for an empty part.
    axis: where the parts are, counted from the front.

  Returns:
    The output and log-sum-exp over all keys, without that axis; 0 and -inf
    where every part is empty.
  """
  peak = jnp.max(lses, axis=axis, keepdims=True)
  safe = jnp.where(jnp.isneginf(peak), 0, peak)
  weight = jnp.exp(lses - safe)
  total = jnp.sum(weight, axis=axis, keepdims=True)
  # Not total > 0: NaN stays.
  some = jnp.where(total == 0, 1, total)
  out = jnp.sum(
    outs * (weight / some)[..., None].astype(outs.dtype), axis=axis
  )
  lse = jnp.where(total == 0, -jnp.inf, jnp.log(some) + safe)
  return out, jnp.squeeze(lse, axis)
