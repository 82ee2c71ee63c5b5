"""Tokens that all heads vote for; see `retrieval`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tokjax import budgets, scores, selection
from tokjax.attention import core
from tokjax.attention.retrieval import Chunk, Retrieval, grouped, mean_query
from tokjax.budgets import Budget
from tokjax.layer import Layer


@dataclasses.dataclass(frozen=True)
class SoftVote(Retrieval):
  """Single tokens that all heads together vote for (TokenSelect).

  Heads spread one vote each over the tokens between the first and the last
  ones, by a softmax of unscaled products of the chunk's mean query with keys
  before rotation. First, chosen and last tokens are then attended to at the
  positions 0, 1, ... of that list. Checked against patcher/token_retrieval.py
  (8e1e97f), except that query head h reads key head h // (H / G).

  Attributes:
    first, local: tokens at either end that are always read.
    budget: tokens chosen between them.
    chunk: queries that choose together, at most `local`.
    kernel: of max-pooling the votes, odd; 1: none.
    rotate_query: whether the voting query is rotated to local positions.
    reuse: cosine to the query that chose last, from which its choice is used
      again; None: every chunk chooses.
  """

  first: int = 128
  local: int = 512
  budget: Budget = budgets.Count(2048)
  chunk: int = 512
  kernel: int = 1
  rotate_query: bool = False
  reuse: float | None = None

  def __post_init__(self):
    if not 1 <= self.chunk <= self.local or self.first < 0:
      raise ValueError(
        f"chunk={self.chunk}, local={self.local}, first={self.first}: a chunk"
        " has to lie within the local tokens, and first is not negative"
      )

  def memo(self, layer, n):
    """The query that chose last, what it chose, and whether there was one."""
    m = min(self.most(layer, n), n)
    zero = jnp.zeros((layer.heads, layer.head_dim), jnp.float32)
    none = jnp.zeros((m,), bool)
    return zero, jnp.zeros((m,), jnp.int32), none, jnp.zeros((), bool)

  def vote(
    self, layer: Layer, chunk: Chunk, q: Float[Array, "h d"]
  ) -> tuple[Float[Array, "n"], Bool[Array, "n"]]:
    """Votes for the tokens in the middle, and which those are."""
    n = chunk.k.shape[0]
    place = jnp.arange(n)
    middle = (place >= self.first) & (place < chunk.now - self.local)
    # Keys on the left: on the right a CPU transposes them first.
    x = jnp.einsum("ngd,grd->gnr", chunk.k, grouped(layer, q))
    x = jnp.swapaxes(x, 1, 2)
    votes = core.softmax(x, middle[None, None]).sum(axis=(0, 1))
    if self.kernel > 1:
      votes = scores.pool(votes, self.kernel, "max")
    return votes, middle

  def choose(self, layer: Layer, chunk: Chunk, memo):
    """Which tokens of the middle are read."""
    q = chunk.q.astype(jnp.float32)
    if self.rotate_query:
      q = layer.rotate(q, self.local + np.arange(q.shape[0]))
    q = mean_query(chunk, q)
    votes, middle = self.vote(layer, chunk, q)
    last, index, valid, there = memo
    m = index.shape[0]
    new = selection.top_k(
      votes, m, mask=middle, count=self.entitled(layer, chunk)
    )
    again = jnp.zeros((), bool)
    if self.reuse is not None:
      norm = jnp.linalg.norm(q) * jnp.linalg.norm(last)
      again = there & ((q * last).sum() >= self.reuse * norm)
    pick = lambda old, new: jnp.where(again, old, new)
    chosen = pick(index, new.index), pick(valid, new.valid)
    acts = middle.any() & chunk.valid.any()
    memo = jax.tree.map(
      lambda new, old: jnp.where(acts, new, old),
      (pick(last, q), *chosen, jnp.ones((), bool)), memo,
    )  # fmt: skip
    return chosen, memo

  def look(self, layer, chunk, memo):
    n = chunk.k.shape[0]
    (index, valid), memo = self.choose(layer, chunk, memo)
    place = jnp.arange(n)
    total = self.first + self.local + self.entitled(layer, chunk)
    few = chunk.now <= total
    ends = (place < self.first) | (place >= chunk.now - self.local)
    picked = jnp.zeros((n,), bool).at[index].max(valid)
    stays = (few | ends | picked) & (place < chunk.now)
    room = min(self.first + self.local + index.shape[0], n)
    pick = selection.of_mask(stays, room)
    read = pick.total
    at = jnp.maximum(read - chunk.now + chunk.place, 0)
    q = layer.rotate(chunk.q, at)
    k = chunk.k[pick.index]
    x = core.logits_of_example(layer, q, k, np.arange(room))[None]
    slot = jnp.arange(room)
    seen = pick.valid[None] & (slot[None] <= at[:, None])
    weight = core.softmax(x, seen[None, None, None])
    v = core.heads_first(chunk.v[pick.index][None])
    return core.join(core.mix(weight, v))[0], memo
