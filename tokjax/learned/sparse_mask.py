"""Sparsifiner: which keys a query sees is predicted at low rank."""

import math
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.attention import dense
from tokjax.selection import top_indices


class SparseMask(nn.Module):
  """Attention over the keys that a predictor of the map selects, per head.

  Query and key are halved in width, keys projected to `rank` tokens, and
  each query's softmax over these, cut to `terms`, mixes learned basis rows
  into a predicted map of which each row keeps its largest `keep` share. The
  class token (row 0) sees everything; the mask has no gradient (Wei et al.,
  2023; checked against src/models/sparsifiner.py).

  Attributes:
    keep: share of keys that a query sees; 1 is dense attention.
    rank: tokens that keys are projected to; None: a sixth of the tokens.
    terms: coefficients kept of the softmax over them.
    floor: entries of the basis up to this are dropped.
    predict: first phase of training: attention stays dense, and the squared
      error of the predicted map is sown as "losses/sparsifiner".
  """

  keep: float = 0.25
  rank: int | None = None
  terms: int = 8
  floor: float = 0.02
  predict: bool = False

  complete = True
  # The predicted map has a row for every token.
  square = True

  def with_keep(self, keep: float) -> "SparseMask":
    """The same with this share of keys."""
    return self.clone(keep=keep)

  @nn.compact
  def __call__(
    self,
    q: Float[Array, "b h n k"],
    k: Float[Array, "b h n k"],
    v: Float[Array, "b h n k"],
    *,
    bias: Float[Array, "b n"] | None = None,
    mask: Bool[Array, "b n"] | None = None,
  ) -> Float[Array, "b h n k"]:
    if self.keep == 1 and not self.predict:
      return dense.Dense()(q, k, v, bias=bias, mask=mask)
    mixture, basis = self.factors(q, k)
    if self.predict:
      weight = dense.probabilities(q, k, bias=bias, mask=mask)
      guess = jnp.einsum("bhmr,nr->bhmn", mixture, basis)
      gap = guess - jax.lax.stop_gradient(weight[:, :, 1:])
      error = jnp.square(gap).sum(axis=(1, 2, 3)).mean()
      self.sow("losses", "sparsifiner", error)
      return dense.mix(weight, v)
    seen = self.connectivity(mixture, basis)
    weight = dense.probabilities(q, k, bias=bias, mask=mask, seen=seen)
    return dense.mix(weight, v)

  def factors(
    self, q: Float[Array, "b h n k"], k: Float[Array, "b h n k"]
  ) -> tuple[Float[Array, "b h q r"], Float[Array, "n r"]]:
    """Coefficients of every query but the first, and the basis they mix."""
    heads, n = q.shape[1], q.shape[2]
    half = q.shape[-1] // 2
    rank = self.rank or max(n // 6, 1)
    small_q = nn.Dense(half, name="query")(jax.lax.stop_gradient(q[:, :, 1:]))
    small_k = nn.Dense(half, name="key")(jax.lax.stop_gradient(k))
    init = nn.initializers.normal(0.02)
    down = self.param("down", init, (n, rank))
    basis = self.param("basis", init, (n, rank))
    few = jnp.einsum("bhnk,nr->bhrk", small_k, down)
    logits = jnp.einsum("bhmk,bhrk->bhmr", small_q, few) * heads**-0.5
    return jax.nn.softmax(logits, axis=-1), basis

  def connectivity(
    self, mixture: Float[Array, "b h q r"], basis: Float[Array, "n r"]
  ) -> Bool[Array, "b h n n"]:
    """True where a query sees a key; the first row is all True."""
    n = basis.shape[0]
    mixture, strong = map(jax.lax.stop_gradient, (mixture, jnp.abs(basis)))
    strongest = largest(mixture, min(self.terms, mixture.shape[-1]))
    mixture = jnp.where(strongest, mixture, 0.0)
    strong = jnp.where(strong > self.floor, strong, 0.0)
    guess = jnp.einsum("bhmr,nr->bhmn", mixture, strong)
    seen = largest(guess, room(self.keep, n))
    first = jnp.ones((*seen.shape[:2], 1, n), bool)
    return jnp.concatenate([first, seen], axis=2)


def room(keep: float, n: int) -> int:
  """Keys that a query sees: the share `keep` of n, rounded up."""
  return math.ceil(Fraction(str(keep)) * n)


def largest(values: Float[Array, "*s n"], count: int) -> Bool[Array, "*s n"]:
  """True at the `count` largest entries of every row; ties: the first."""
  mark = lambda index: jnp.zeros(values.shape[-1], bool).at[index].set(True)
  for _ in range(values.ndim - 1):
    mark = jax.vmap(mark)
  return mark(top_indices(values, count))
