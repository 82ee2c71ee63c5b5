"""Blocks of the distant past next to a window; see `retrieval`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import budgets, selection
from tokjax.attention import core
from tokjax.attention.retrieval import Chunk, Retrieval, mean_query
from tokjax.budgets import Budget
from tokjax.layer import Layer


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
    before = chunk.now - chunk.valid.sum()
    first, blocks = self.layout(before)
    rest = first + blocks * self.block
    far_q = layer.rotate(chunk.q, jnp.full((c,), self.local - 1))
    score, *more = self.relevance(layer, chunk, far_q, reps, blocks, *more)
    # Places that are read at the constant distance, and the window.
    far, far_ok = jnp.zeros((0,), int), jnp.zeros((0,), bool)
    if n > self.local:  # Else nothing can have left the window.
      place = jnp.arange(self.first)
      picked, valid = self.retrieve(layer, chunk, score, blocks)
      far = jnp.concatenate([place, picked])
      far_ok = jnp.concatenate([place < first, valid])
    width = min(self.local + max(self.block, self.first) + c, n)
    start = jnp.minimum(rest, n - width)
    near = start + jnp.arange(width)
    at = jnp.minimum(jnp.concatenate([far, near]), n - 1)
    k, v = chunk.k[at], chunk.v[at]
    distance = chunk.place[:, None] - near[None]
    local = distance < self.local
    there = (near >= rest)[None] & (distance >= 0)
    seen = jnp.concatenate(
      [jnp.broadcast_to(far_ok[None], (c, far.shape[0])), there], axis=1
    )
    m = far.shape[0]
    q = layer.rotate(chunk.q, chunk.place)
    x = core.logits_of_example(layer, q, layer.rotate(k[m:], near))
    if n > self.local:
      # Later tokens are in the window of all queries: before the chunk at most
      # a block, or the first ones, had left it, and c more leave in it.
      old = min(max(self.block, self.first) + c, width)
      distant = core.logits_of_example(layer, far_q, k[: m + old])
      past = jnp.where(local[None, None, :, :old], x[..., :old],
                       distant[..., m:])  # fmt: skip
      x = jnp.concatenate([distant[..., :m], past, x[..., old:]], axis=-1)
    weight = core.softmax(x, seen[None, None])
    out = core.join(core.mix(weight[None], core.heads_first(v[None])))[0]
    own = local & chunk.valid[:, None]
    given = jnp.where(own[None, None], weight[..., m:], 0.0).sum(axis=2)
    given = given.reshape(layer.heads, width).T
    return out, (mass.at[near].add(given), reps, *more)

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
    """Places of the tokens in the blocks that all heads together choose."""
    most, count = self.share(layer, chunk, blocks)
    number, most = jnp.arange(len(score)), min(most, len(score))
    top = selection.top_k(score, most, mask=number < blocks, count=count)
    start = self.first + top.index * self.block
    place = start[:, None] + jnp.arange(self.block)[None]
    valid = jnp.broadcast_to(top.valid[:, None], place.shape)
    return place.reshape(-1), valid.reshape(-1)

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
