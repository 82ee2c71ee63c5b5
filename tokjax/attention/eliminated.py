"""Attention without blocks of tokens that a small network expects little of.

A block's score is what it has to do with all others: a sum over blocks of the
largest sum over heads of positive logits between them. Blocks with small scores
neither ask nor answer: attention adds nothing to their tokens, which stay in
the text for the next layer. So a layer computes less and, in training, holds
less. Two networks that are given a block's inputs, head by head, predict the
scores.

LeMo (Wang et al., 2025); checked against Pairshoe/Jenga-AE: src/jenga/models/
predictor.py, modeling_llama.py, modeling_llama_train_predictor.py,
modeling_llama_get_sparsity_thresh.py and ops/ (498cb19).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokjax import budgets, selection
from tokjax.attention import core
from tokjax.attention.causal import Causal, need_whole
from tokjax.budgets import Budget
from tokjax.layer import Arrivals, Layer, Memory, with_loss

DENSE = Causal()
LOSS = "pairs"
# Pairs of blocks as the networks learn them: 64 and 16 of the official code.
SMALLER = 64 * 16


def parameters(
  channels: int, block: int, hidden: int, key: PRNGKeyArray
) -> dict[str, Array]:
  """Of the two networks; a token has so many `channels` a head."""
  wide, made = channels * block, {}
  sizes = {"1": (wide, hidden), "2": (hidden, wide), "3": (wide, channels)}
  for i, (name, (inputs, outputs)) in enumerate(sizes.items()):
    for j, side in enumerate("qk"):
      drawn = jax.random.normal(
        jax.random.fold_in(key, 2 * i + j), (inputs, outputs)
      )
      made[side + name] = drawn * inputs**-0.5
  return made


def predicted(
  params: dict[str, Array], x: Float[Array, "n w"], heads: int, block: int
) -> Float[Array, "m m"]:
  """What block i has to do with block j, from the inputs of a layer.

  Args:
    params: see `parameters`.
    x: inputs, zeros in padding; n is a multiple of `block`.
    heads: which share the channels of `x`.
    block: tokens a block.
  """
  x = x.reshape(-1, block, heads, x.shape[1] // heads)
  x = jnp.moveaxis(x, 2, 0).reshape(heads, x.shape[0], -1)

  def side(name):
    y = jax.nn.relu(x @ params[f"{name}1"])
    return jax.nn.relu(y @ params[f"{name}2"]) @ params[f"{name}3"]

  return jnp.einsum("hic,hjc->ij", side("q"), side("k"))


def measured(
  q: Float[Array, "n h d"], k: Float[Array, "n g d"], block: int, causal: bool
) -> Float[Array, "m m"]:
  """The largest sum over heads of positive products in each pair of blocks.

  Args:
    q, k: before rotation, zeros in padding; n is a multiple of `block`.
    block: tokens a block.
    causal: products with later keys do not count.
  """
  n, g = q.shape[0], k.shape[1]
  place = jnp.arange(n)

  def row(q, at):
    q = q.reshape(block, g, -1, q.shape[-1])
    x = jnp.einsum("igrd,jgd->ijgr", q, k)
    x = jax.nn.relu(x).sum(axis=(2, 3))
    if causal:
      x = jnp.where(place[None] <= at[:, None], x, 0.0)
    return x.max(axis=0).reshape(-1, block).max(axis=1)

  cut = lambda x: x.reshape(-1, block, *x.shape[1:])
  return jax.lax.map(lambda part: row(*part), (cut(q), cut(place)))


@dataclasses.dataclass(frozen=True)
class Eliminated(Causal):
  """See the module. While decoding, everything is read.

  Attributes:
    budget: tokens that remain, in whole blocks.
    block: tokens a block.
    threshold: blocks that score less than this share of the mean score go too;
      None: the budget alone decides.
    last: last blocks that stay in any case, within the budget.
    from_layer: the first layer that eliminates blocks.
    to_end: the last layer eliminates blocks, too.
    hidden: units of the networks.
    predicts: scores are predicted; False: measured, to compare with.
    learns: attention is dense and leaves the loss of the networks.
  """

  budget: Budget = budgets.Share(0.5)
  block: int = 64
  threshold: float | None = None
  last: int = 0
  from_layer: int | float = 0.47
  to_end: bool = False
  hidden: int = 128
  predicts: bool = True
  learns: bool = False

  def __post_init__(self):
    for name, least in (("block", 1), ("hidden", 1), ("last", 0)):
      if getattr(self, name) < least:
        raise ValueError(
          f"{name}={getattr(self, name)}: must be {least} or more"
        )

  @property
  def needs(self) -> tuple[str, ...]:
    return ("x",)

  @property
  def whole(self) -> bool:
    return True

  def with_keep(self, keep: float) -> "Eliminated":
    return dataclasses.replace(self, budget=self.budget.with_keep(keep))

  def acts(self, index: int, depth: int) -> bool:
    """Whether a layer eliminates blocks."""
    first = budgets.block(self.from_layer, depth, "from_layer")
    return first <= index < depth - (not self.to_end)

  def check(self, layer, prompt):
    layer.ask(self.acts)

  def parameters(self, layer, width, key):
    """Of the two networks of a layer that eliminates blocks."""
    if layer.window is not None or not layer.ask(self.acts):
      return None
    if not self.predicts:
      return None
    if width % layer.heads:
      raise ValueError(
        f"{layer.heads} heads: must divide the width {width}, whose parts the"
        " networks are given"
      )
    return parameters(width // layer.heads, self.block, self.hidden, key)

  def __call__(self, layer, arrivals, memory, *, params, carry):
    if layer.window is not None or not layer.ask(self.acts):
      return DENSE(layer, arrivals, memory, params=params, carry=carry)
    a = arrivals.clean()
    need_whole(self, a, memory)
    if self.learns:
      loss = self._loss(layer, a, params["attend"])
      carry = with_loss(carry, LOSS, loss)
      return DENSE(layer, arrivals, memory, params=params, carry=carry)
    index, valid = self._kept(layer, a, params.get("attend"))
    few = lambda x: core.taken(x, index)
    some = Arrivals(
      few(a.q), few(a.k), few(a.v), few(a.position), valid, gaps=True
    )
    out = DENSE(layer, some, Memory.of(some), params={}, carry={})[0]
    at = jnp.where(valid, index, a.q.shape[1])
    put = lambda out, i: jnp.zeros_like(a.q[0]).at[i].set(out, mode="drop")
    out = jax.vmap(put)(out.astype(a.q.dtype), at)
    return self.finish(layer, out, a, params), carry

  def _padded(self, x: Array) -> Array:
    """`x [b, n, ...]` up to whole blocks."""
    more = -x.shape[1] % self.block
    return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))

  def _loss(self, layer: Layer, a: Arrivals, made) -> Float[Array, ""]:
    """Smooth L1 distance of predictions from what is measured."""
    x, q, k = map(self._padded, jax.lax.stop_gradient((a.x, a.q, a.k)))
    guess = jax.vmap(lambda x: predicted(made, x, layer.heads, self.block))(x)
    truth = jax.vmap(lambda q, k: measured(q, k, self.block, False))(q, k)
    gap = jnp.abs(guess - truth / SMALLER)
    gap = jnp.where(gap < 1, 0.5 * gap * gap, gap - 0.5)
    real = self._real(a)
    pair = real[:, :, None] & real[:, None]
    return jnp.where(pair, gap, 0.0).sum() / jnp.maximum(pair.sum(), 1)

  def _real(self, a: Arrivals) -> Bool[Array, "b m"]:
    """Blocks that hold a real token."""
    return self._padded(a.valid)[:, :: self.block]

  def scores(self, layer: Layer, a: Arrivals, made) -> Float[Array, "b m"]:
    """Of every block."""
    if self.predicts:
      one = lambda x: predicted(made, x, layer.heads, self.block).sum(axis=0)
      return jax.vmap(one)(self._padded(a.x))

    def one(q, k):
      pair = measured(q, k, self.block, True)
      return (pair + jnp.triu(pair.T, 1)).sum(axis=0)

    return jax.vmap(one)(self._padded(a.q), self._padded(a.k)) * layer.factor

  def _kept(
    self, layer: Layer, a: Arrivals, made
  ) -> tuple[Int[Array, "b r"], Bool[Array, "b r"]]:
    """Places of tokens that remain, in order; False behind the real ones."""
    t, s, real = a.q.shape[1], self.block, self._real(a)
    score = jax.lax.stop_gradient(self.scores(layer, a, made))
    score = jnp.where(real, score.astype(jnp.float32), 0.0)
    length = a.valid.sum(axis=1)
    count = budgets.counts(self.budget, layer, a.valid)
    blocks = jnp.where(
      count >= length, -(-length // s), jnp.maximum(count // s, 1)
    )
    table = layer.ask(budgets.table, self.budget, t)
    most = min(max(int(table.max()) // s, 1) + 1, real.shape[1])
    may = real
    if self.threshold is not None:
      mean = score.sum(axis=1) / jnp.maximum(real.sum(axis=1), 1)
      may &= score >= self.threshold * mean[:, None]
    number = jnp.arange(real.shape[1])[None]
    end = real & (number >= (-(-length // s) - self.last)[:, None])
    score = jnp.where(end, jnp.inf, score)

    def one(score, may, blocks, length):
      top = selection.in_order(
        selection.top_k(score, most, mask=may, count=blocks)
      )
      at = top.index[:, None] * s + jnp.arange(s)[None]
      valid = top.valid[:, None] & (at < length)
      return jnp.minimum(at, t - 1).reshape(-1), valid.reshape(-1)

    return jax.vmap(one)(score, may | end, blocks, length)
