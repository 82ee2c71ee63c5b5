"""Attention to tokens of chunks that fit a block of queries (DHSA)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import budgets, selection
from tokjax.attention import boundaries, core
from tokjax.attention.causal import Causal, need_whole
from tokjax.budgets import Budget
from tokjax.layer import Arrivals, Layer, Memory, with_loss

DENSE = Causal()
LOSS = "boundaries"
# Places at which attention to both sides differs by this factor end a chunk.
CONTRAST = 2.0


@dataclasses.dataclass(frozen=True)
class DynamicChunks(Causal):
  """Blocks of queries see tokens of the chunks that they fit (DHSA).

  Keys fall into chunks of varying length, which a predictor of each layer
  finds. A chunk of keys is represented by its sum over the root of its size, a
  block of queries likewise, both as means over heads. The products of the two
  rank the tokens; what each block keeps is attended to exactly. The last tokens
  and the first ones are always kept; the latter take the places of the first
  tokens that were chosen. Sliding layers see their window. While decoding,
  everything is read. Checked against legacy/utils/helper.py (cc8e9c7).

  Attributes:
    budget: tokens that a block sees, at least `first + near`.
    block: queries a block.
    first: first tokens that every block sees.
    near: last tokens up to the end of a block that it sees.
    exact: last queries of a prompt, which see everything.
    window: tokens on either side of a place that the predictor compares.
    apart: tokens that ends of chunks are apart, at least, but one.
    chunks_per_block: bound of the number of chunks, for every `block` tokens.
    certainty: logit above which a place may end a chunk.
    learns: attention is dense and leaves the loss of the predictor.
  """

  budget: Budget = budgets.Count(1024)
  block: int = 64
  first: int = 128
  near: int = 128
  exact: int = 64
  window: int = 4
  apart: int = 8
  chunks_per_block: int = 8
  certainty: float = 1.1
  learns: bool = False

  def __post_init__(self):
    least = {"first": 0, "near": 1, "exact": 0, "apart": 0}
    for name in (*least, "block", "window", "chunks_per_block"):
      value = getattr(self, name)
      if value < least.get(name, 1):
        raise ValueError(
          f"{name}={value}: must be {least.get(name, 1)} or more"
        )

  @property
  def whole(self) -> bool:
    return True

  def with_keep(self, keep: float) -> "DynamicChunks":
    return dataclasses.replace(self, budget=self.budget.with_keep(keep))

  def check(self, layer, prompt):
    if self.channels(layer) % boundaries.HEADS:
      raise ValueError(
        f"{layer.kv_heads} key heads of {layer.head_dim} channels cannot be"
        f" compared by {boundaries.HEADS} heads, which have to divide them"
      )

  def channels(self, layer: Layer) -> int:
    """Of a token's keys, all heads together."""
    return layer.kv_heads * layer.head_dim

  def parameters(self, layer, width, key):
    """Of the predictor of chunks, see `boundaries.parameters`."""
    return boundaries.parameters(self.channels(layer), key)

  def counts(self, layer: Layer, n: int):
    """Tokens that blocks of prompts of every length up to n see."""
    of = layer.ask(budgets.table, self.budget, n)
    return of.clip(self.first + self.near)

  def starts(
    self, params, k: Float[Array, "n g d"], length: Int[Array, ""]
  ) -> Bool[Array, "n"]:
    """Tokens that begin a chunk; `k` rotated, zeros in padding."""
    n = k.shape[0]
    params, k = jax.lax.stop_gradient((params, k))
    score = boundaries.logits(params, k.reshape(n, -1), self.window)
    may = boundaries.inside(length, n, self.window)
    last = boundaries.ends(
      score, may & (score > self.certainty), apart=self.apart,
      forced=length - self.exact,
      most=self.chunks_per_block * (length // self.block),
    )  # fmt: skip
    return jnp.pad(last, (1, 0))[:-1]

  def scores(
    self,
    q: Float[Array, "t h d"],
    k: Float[Array, "n g d"],
    starts: Bool[Array, "n"],
    length: Int[Array, ""],
  ) -> Float[Array, "m n"]:
    """Of every token for each block of queries, from rotated ones."""
    t, n = q.shape[0], k.shape[0]
    q, k = (x.astype(jnp.float32).mean(axis=1) for x in (q, k))
    # Zeros in padding: sums and sizes are those of real tokens.
    routed = jnp.arange(t) < length - self.exact
    q, more = jnp.where(routed[:, None], q, 0.0), (0, -t % self.block)
    q = jnp.pad(q, [more, (0, 0)]).reshape(-1, self.block, q.shape[1])
    q = q.sum(axis=1)
    routed = jnp.pad(routed, more).reshape(-1, self.block)
    q = q / jnp.sqrt(jnp.maximum(routed.sum(axis=1), 1))[:, None]
    real = jnp.arange(n) < length
    chunk = jnp.cumsum(starts)
    total = lambda x: jax.ops.segment_sum(x, chunk, num_segments=n + 1)
    size = jnp.maximum(total(real.astype(jnp.float32)), 1)
    of_chunks = total(jnp.where(real[:, None], k, 0.0))
    return q @ (of_chunks / jnp.sqrt(size)[:, None])[chunk].T

  def choose(
    self,
    score: Float[Array, "n"],
    row: Int[Array, ""],
    length: Int[Array, ""],
    most: int,
    count: Int[Array, ""],
  ) -> tuple[Int[Array, "m"], Bool[Array, "m"]]:
    """Tokens that block number `row` sees as far as they are not later."""
    place = jnp.arange(score.shape[0])
    end = jnp.minimum((row + 1) * self.block, length)
    score = jnp.where(place >= end - self.near, jnp.inf, score)
    top = selection.in_order(
      selection.top_k(score, most, mask=place < end, count=count)
    )
    slot = jnp.arange(most)
    early = slot < self.first
    index = jnp.where(early, slot, top.index)
    return index, jnp.where(early, slot < end, top.valid)

  def __call__(self, layer, arrivals, memory, *, params, carry):
    if layer.window is not None:
      return DENSE(layer, arrivals, memory, params=params, carry=carry)
    a = arrivals.clean()
    need_whole(self, a, memory)
    t, made = a.q.shape[1], params["attend"]
    if self.learns:
      carry = with_loss(carry, LOSS, self._loss(layer, a, memory, made))
      return DENSE(layer, arrivals, memory, params=params, carry=carry)
    q = layer.rotate(a.q, a.position)
    k, v = layer.rotate(memory.k, memory.position), memory.v
    length = a.valid.sum(axis=1)
    counts = self.counts(layer, t)
    most = min(int(counts.max()), t)

    def of_example(q, k, length):
      starts = self.starts(made, k, length)
      return self.scores(q, k, starts, length)

    score = jax.lax.stop_gradient(jax.vmap(of_example)(q, k, length))

    def of_block(row):
      at = jnp.minimum(row * self.block + jnp.arange(self.block), t - 1)
      index, valid = jax.vmap(
        lambda s, n, count: self.choose(s[row], row, n, most, count)
      )(score, length, jnp.asarray(counts)[length])
      seen = valid[:, None] & (index[:, None] <= at[None, :, None])
      own = lambda x: core.taken(x, index)
      return core.attended(layer, q[:, at], own(k), own(v), seen)

    blocks = -(-t // self.block)
    out = jax.lax.map(core.forgetful(of_block), jnp.arange(blocks))
    out = jnp.moveaxis(out, 0, 1).reshape(len(q), -1, *q.shape[2:])[:, :t]
    out = self._with_exact(layer, out, q, k, v, length)
    return self.finish(layer, out, a, params), carry

  def _loss(
    self, layer: Layer, a: Arrivals, memory: Memory, made
  ) -> Float[Array, ""]:
    """Of the predictor, a mean over examples; nothing else learns from it."""
    t, (a, memory) = a.q.shape[1], jax.lax.stop_gradient((a, memory))
    attention = DENSE.weights(layer, a, memory)(jnp.arange(t)).mean(axis=(1, 2))
    k = layer.rotate(memory.k, memory.position).reshape(len(a.q), t, -1)

    def one(attention, k, length):
      ratio = boundaries.contrast(attention, length, self.window)
      target = (ratio >= CONTRAST).astype(jnp.float32)
      logit = boundaries.logits(made, k, self.window)
      may = boundaries.inside(length, t, self.window)
      return boundaries.focal_loss(logit, target, may)

    return jax.vmap(one)(attention, k, a.valid.sum(axis=1)).mean()

  def _with_exact(self, layer, out, q, k, v, length):
    """The last real queries' outputs replaced by dense ones."""
    t, rows = q.shape[1], min(self.exact, q.shape[1])
    if not rows:
      return out
    at = length[:, None] - 1 - jnp.arange(rows)[None]
    place = jnp.maximum(at, 0)
    last = core.taken(q, place)
    seen = jnp.arange(t)[None, None] <= place[:, :, None]
    dense = core.attended(layer, last, k, v, seen)
    at = jnp.where(at >= 0, at, t)
    return jax.vmap(lambda o, i, x: o.at[i].set(x, mode="drop"))(out, at, dense)
