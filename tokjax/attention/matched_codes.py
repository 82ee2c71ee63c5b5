"""Attention to the keys whose codes agree most with the query's (SPT, 2023).

Queries and keys are cut into parts, each of which has the number of the nearest
of a few codewords. A query sees the keys with which it has most numbers in
common. Codewords are learned while attention is dense, and with them, as far as
they are trained, queries and keys.

Gui & Xiao, 2023; checked against ytgui/SPT-proto: naive_gpt/layers/basic/
quantizer.py, layers/sparse/attention.py (65ee7de).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import budgets
from tokjax.attention import core
from tokjax.attention.causal import Causal, by_group, need_whole
from tokjax.budgets import Budget
from tokjax.layer import Layer, with_loss

DENSE = Causal()
LOSS = "codewords"


def distances(
  words: Float[Array, "p w c"], x: Float[Array, "*b d"]
) -> Float[Array, "*b p w"]:
  """Sums of absolute differences of each part of `x` from each codeword."""
  parts = x.reshape(*x.shape[:-1], words.shape[0], 1, words.shape[2])
  return jnp.abs(parts - words[(None,) * (x.ndim - 1)]).sum(axis=-1)


def codes(
  words: Float[Array, "p w c"], x: Float[Array, "*b d"]
) -> Int[Array, "*b p"]:
  """The nearest codeword of each part; ties go to the lower number."""
  return jnp.argmin(distances(words, x), axis=-1)


def quantisation_loss(
  words: Float[Array, "p w c"],
  x: Float[Array, "b n h d"],
  valid: Bool[Array, "b n"],
) -> Float[Array, ""]:
  """How far vectors, and soft choices of codewords, are from the nearest ones.

  Mean squares over real tokens. Soft weights go by the inverse of distances.
  """
  distance = distances(words, x)
  nearest = jax.nn.one_hot(jnp.argmin(distance, axis=-1), words.shape[1])
  weight = jax.nn.softmax(-jnp.log(jnp.maximum(distance, 1e-5)), axis=-1)
  made = lambda w: jnp.einsum("...pw,pwc->...pc", w, words)
  hard, soft = made(nearest), made(weight)
  gap = jnp.square(soft - hard) + jnp.square(x.reshape(hard.shape) - hard)
  mean = jnp.where(valid, gap.mean(axis=(2, 3, 4)), 0.0)
  return mean.sum() / jnp.maximum(valid.sum(), 1)


@dataclasses.dataclass(frozen=True)
class MatchedCodes(Causal):
  """See the module. While decoding, every token sees everything.

  Attributes:
    budget: keys that a query sees.
    part: features of a codeword, which divide a head's.
    words: codewords of a part.
    bound: scaled logits are clipped to this on either side.
    learns: attention leaves the loss of its codewords.
    dense: every key is seen, which is the first stage of training.
  """

  budget: Budget = budgets.Share(1 / 8)
  part: int = 8
  words: int = 16
  bound: float = 10.0
  learns: bool = False
  dense: bool = False

  def __post_init__(self):
    if self.dense and not self.learns:
      raise ValueError("dense=True: is a stage of training; needs learns=True")
    for name in ("part", "words"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
    if not self.bound > 0:
      raise ValueError(f"bound={self.bound}: must be positive")

  @property
  def whole(self) -> bool:
    return True

  def with_keep(self, keep: float) -> "MatchedCodes":
    return dataclasses.replace(self, budget=self.budget.with_keep(keep))

  def check(self, layer, prompt):
    if layer.head_dim % self.part:
      raise ValueError(
        f"part={self.part}: must divide the {layer.head_dim} features of a head"
      )

  def parameters(self, layer, width, key):
    """One set of codewords for queries and keys of all heads."""
    shape = (layer.head_dim // self.part, self.words, self.part)
    return {"words": jax.random.normal(key, shape)}

  def __call__(self, layer, arrivals, memory, *, params, carry):
    a, words = arrivals.clean(), params["attend"]["words"]
    need_whole(self, a, memory)
    q = layer.rotate(a.q, a.position)
    k = layer.rotate(memory.k, memory.position)
    if self.learns:
      loss = quantisation_loss(words, q, a.valid)
      loss += quantisation_loss(words, k, memory.valid)
      carry = with_loss(carry, LOSS, loss)
    if self.dense:
      return DENSE(layer, arrivals, memory, params=params, carry=carry)
    chosen = self._chosen(layer, codes(words, q), codes(words, k), a, memory)
    q, k = core.split(q, layer.kv_heads), core.heads_first(k)
    v = core.heads_first(memory.v)

    def rows(at):
      x = core.logits(layer, q[:, :, :, at], k)
      x = jnp.clip(x, -self.bound, self.bound)
      weight = core.softmax(x, by_group(layer, chosen(at)))
      return core.join(core.mix(weight, v))

    out = core.over_rows(rows, a.q.shape[1])
    return self.finish(layer, out, a, params), carry

  def _chosen(self, layer: Layer, q, k, a, memory):
    """From query numbers `[c]` to the keys of each head, `[b, H, c, n]`."""
    n = memory.k.shape[1]
    count = budgets.counts(self.budget, layer, memory.valid)
    k = jnp.repeat(k, layer.group, axis=2)
    # Later keys come behind earlier ones with as many common numbers.
    place = jnp.arange(n)[None, None, None]

    def rows(at):
      same = q[:, at, None] == k[:, None]  # [b, c, n, H, p]
      match = jnp.moveaxis(same.sum(axis=-1), 3, 1)
      seen = core.visible(
        layer, a.position[:, at], memory.position, memory.valid
      )[:, None]
      order = jnp.where(seen, match * n + n - 1 - place, -1)
      least = jnp.sort(order, axis=-1)
      index = jnp.maximum(n - count, 0)[:, None, None, None]
      least = jnp.take_along_axis(least, index, axis=-1)
      return seen & (order >= least)

    return rows
