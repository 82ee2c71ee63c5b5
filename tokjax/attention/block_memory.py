"""Blocks of the distant past next to a window; see `retrieval`."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import budgets, selection
from tokjax.attention import core
from tokjax.attention.retrieval import Chunk, Retrieval, mean_query
from tokjax.budgets import Budget
from tokjax.layer import Layer


class Distant(NamedTuple):
  """Attributes:
  k, v: of the tokens that one example reads, before rotation, `[m, G, D]`.
  seen: False for those that are not there, `[m]`.
  """

  k: Float[Array, "m g d"]
  v: Float[Array, "m g d"]
  seen: Bool[Array, "m"]


@dataclasses.dataclass(frozen=True)
class BlockMemory(Retrieval):
  """Blocks of the distant past next to a local window (InfLLM).

  Tokens that leave the window form blocks, represented for every query head by
  the mean key of those that received most attention while they were in it. A
  chunk of queries reads the first tokens, the blocks that fit its mean query,
  and what has left the window but fills no block yet, all at one constant
  distance, together with the window itself, in one softmax. Checked against
  inf_llm/attention/context_manager.py (12b7079).

  Attributes:
    first: first tokens that are always read.
    local: size of the window; the constant distance is `local - 1`.
    budget: tokens of the blocks that are read.
    block: tokens a block.
    representatives: tokens whose mean key represents a block.
    chunk: queries that retrieve together, at most `local`.
  """

  first: int = 128
  local: int = 4096
  budget: Budget = budgets.Count(2048)
  block: int = 128
  representatives: int = 4
  chunk: int = 512

  def __post_init__(self):
    if not 1 <= self.chunk <= self.local:
      raise ValueError(f"chunk={self.chunk}: must lie in 1..local={self.local}")
    if not 1 <= self.representatives <= self.block:
      raise ValueError(
        f"representatives={self.representatives}: must lie in"
        f" 1..block={self.block}"
      )

  def memo(self, layer, n):
    """Attention that tokens received locally, and keys of the blocks."""
    blocks = max((n - self.first - self.local) // self.block, 1)
    return (
      jnp.zeros((n, layer.heads), jnp.float32),
      jnp.zeros((blocks, layer.heads, layer.head_dim), jnp.float32),
    )

  def layout(self, there: Array) -> tuple[Array, Array]:
    """First tokens set aside and blocks formed when so many are there."""
    first = jnp.clip(there - self.local, 0, self.first)
    blocks = (there - first - self.local) // self.block
    return first, jnp.maximum(blocks, 0)

  def look(self, layer, chunk, memo):
    mass, reps, *more = memo
    c, n = chunk.q.shape[0], chunk.k.shape[0]
    first, blocks = self.layout(chunk.now - chunk.valid.sum())
    rest = first + blocks * self.block
    far_q = layer.rotate(chunk.q, np.full((c,), self.local - 1))
    score, *more = self.relevance(layer, chunk, far_q, reps, blocks, *more)
    far = self.distant(layer, chunk, score, first, blocks)
    width = min(self.local + max(self.block, self.first) + c, n)
    start = jnp.minimum(rest, n - width)
    # Slices, since single rows take a CPU many times as long to fetch.
    sliced = lambda x: jax.lax.dynamic_slice_in_dim(x, start, width)
    k, v = sliced(chunk.k), sliced(chunk.v)
    near = start + jnp.arange(width)
    distance = chunk.place[:, None] - near[None]
    local, m = distance < self.local, far.k.shape[0]
    there = (near >= rest)[None] & (distance >= 0)
    far_seen = jnp.broadcast_to(far.seen[None], (c, m))
    seen = jnp.concatenate([far_seen, there], axis=1)
    x = self.logits(layer, chunk, far_q, far.k, k, start, local)
    weight = core.softmax(x, seen[None, None])
    mixed = lambda weight, v: core.mix(weight[None], core.heads_first(v[None]))
    out = mixed(weight[..., m:], v)
    if m:
      out = out + mixed(weight[..., :m], far.v)
    own = local & chunk.valid[:, None]
    given = jnp.where(own[None, None], weight[..., m:], 0.0).sum(axis=2)
    given = sliced(mass) + given.reshape(layer.heads, width).T
    mass = jax.lax.dynamic_update_slice_in_dim(mass, given, start, 0)
    return core.join(out)[0], (mass, reps, *more)

  def distant(
    self,
    layer: Layer,
    chunk: Chunk,
    score: Float[Array, "m"],
    first: Int[Array, ""],
    blocks: Int[Array, ""],
  ) -> Distant:
    """What is read at the constant distance: first tokens, and chosen blocks.

    Args:
      layer, chunk: the queries.
      score: of blocks.
      first: how many first tokens are set aside.
      blocks: how many there are.
    """
    n = chunk.k.shape[0]
    if n <= self.local:  # Nothing can have left the window.
      return Distant(chunk.k[:0], chunk.v[:0], jnp.zeros((0,), bool))
    start, valid = self.retrieve(layer, chunk, score, blocks)
    sinks = min(self.first, n)
    block = lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, self.block)

    def of(x):
      if not start.size:
        return x[:sinks]
      picked = jax.vmap(block, (None, 0))(x, start)
      return jnp.concatenate([x[:sinks], picked.reshape(-1, *x.shape[1:])])

    seen = jnp.arange(sinks) < first
    seen = jnp.concatenate([seen, jnp.repeat(valid, self.block)])
    return Distant(of(chunk.k), of(chunk.v), seen)

  def logits(
    self,
    layer: Layer,
    chunk: Chunk,
    far_q: Float[Array, "c h d"],
    far_k: Float[Array, "m g d"],
    k: Float[Array, "w g d"],
    start: Int[Array, ""],
    local: Bool[Array, "c w"],
  ) -> Float[Array, "g r c n"]:
    """Of what is distant, then of the window.

    Args:
      layer, chunk: the queries.
      far_q: queries at the constant distance.
      far_k: distant keys.
      k: keys from the place `start` on.
      start: see above.
      local: False for keys of these that have left a query's window.
    """
    c, width = local.shape
    # Turned as if the text began there: what is turned by is known beforehand.
    q = layer.rotate(chunk.q, chunk.place - start)
    x = core.logits_of_example(layer, q, k, np.arange(width))
    if chunk.k.shape[0] <= self.local:
      return x
    # Later tokens are in the window of all queries: before the chunk at most a
    # block, or the first ones, had left it, and c more leave in it.
    old, m = min(max(self.block, self.first) + c, width), far_k.shape[0]
    both = jnp.concatenate([far_k, k[:old]])
    far = core.logits_of_example(layer, far_q, both)
    past = jnp.where(local[None, None, :, :old], x[..., :old], far[..., m:])
    return jnp.concatenate([far[..., :m], past, x[..., old:]], axis=-1)

  def relevance(
    self,
    layer: Layer,
    chunk: Chunk,
    q: Float[Array, "c h d"],
    reps: Float[Array, "m h d"],
    blocks: Int[Array, ""],
    *more: Any,
  ) -> tuple[Any, ...]:
    """Scores `[m]` of blocks, of which `blocks` are there; the rest of a memo.

    Here: products with the mean query, summed over heads.
    """
    return jnp.einsum("hd,mhd->m", mean_query(chunk, q), reps), *more

  def share(
    self, layer: Layer, chunk: Chunk, blocks: Int[Array, ""]
  ) -> tuple[int, Int[Array, ""]]:
    """How many blocks are read: a static bound, and this example's number."""
    most = self.most(layer, chunk.k.shape[0]) // self.block
    return most, self.entitled(layer, chunk) // self.block

  def retrieve(
    self,
    layer: Layer,
    chunk: Chunk,
    score: Float[Array, "m"],
    blocks: Int[Array, ""],
  ) -> tuple[Int[Array, "p"], Bool[Array, "p"]]:
    """Where the blocks begin that all heads together choose, and whether."""
    most, count = self.share(layer, chunk, blocks)
    room = len(score) if len(chunk.k) >= self.block else 0
    there, most = jnp.arange(len(score)) < blocks, min(most, room)
    index, valid = selection.top_k(score, most, mask=there, count=count)
    assert valid is not None  # Since there is a mask.
    return self.first + index * self.block, valid

  def due(self, chunk):
    """Tokens that leave the window complete a block."""
    before = chunk.now - chunk.valid.sum()
    return self.layout(chunk.now)[1] > self.layout(before)[1]

  def digest(self, layer, chunk, memo):
    """Keys of the blocks that the chunk completes."""
    mass, reps, *more = memo
    before = chunk.now - chunk.valid.sum()
    old, new = self.layout(before)[1], self.layout(chunk.now)[1]
    n, m = chunk.k.shape[0], reps.shape[0]
    if n < self.block:
      return memo  # There is no room for a block, and none is ever due.
    for i in range(min(-(-chunk.q.shape[0] // self.block) + 1, m)):
      number = old + i
      start = jnp.minimum(self.first + number * self.block, n - self.block)
      part = lambda x, at=start: jax.lax.dynamic_slice_in_dim(x, at, self.block)
      key = self.representative(layer, part(mass), part(chunk.k))
      reps = reps.at[jnp.where(number < new, number, m)].set(key, mode="drop")
    return mass, reps, *more

  def representative(
    self, layer: Layer, mass: Float[Array, "s h"], k: Float[Array, "s g d"]
  ) -> Float[Array, "h d"]:
    """Mean key of a block's tokens that received most, head by head."""

    def head(mass, g):
      top = selection.top_k(mass, self.representatives)
      return k[top.index, g].astype(jnp.float32).mean(axis=0)

    return jax.vmap(head, (1, 0))(mass, jnp.arange(layer.heads) // layer.group)
