"""Attention that first retrieves: chunks of queries look for what they need.

A method is written once, for a chunk of one example's queries and all keys
before them (never rotated): a prompt is read chunk by chunk, a decoded token
is a chunk of one. `tokjax.cache.retriever.Retriever` is the cache that
goes with any of them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import budgets
from tokjax.attention.causal import Causal, need_whole
from tokjax.budgets import Budget
from tokjax.layer import NOTES, Layer

# What a method remembers of one example, without keys and values: arrays, or
# named tuples of them.
Memo = tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk:
  """Queries of one example and what they may look at.

  Attributes:
    q: before rotation, `[*b, c, H, D]`.
    place: of those tokens, `[*b, c]`.
    valid: False for padding, which stands last, `[*b, c]`.
    k, v: of all tokens, before rotation, `[*b, n, G, D]`.
    now: how many tokens are there, the chunk included, `[*b]`.
    prompt: length of the prompt, which budgets follow, `[*b]`.
  """

  q: Float[Array, "*b c h d"]
  place: Int[Array, "*b c"]
  valid: Bool[Array, "*b c"]
  k: Float[Array, "*b n g d"]
  v: Float[Array, "*b n g d"]
  now: Int[Array, "*b"]
  prompt: Int[Array, "*b"]


def mean_query(chunk: Chunk, q: Float[Array, "c h d"]) -> Float[Array, "h d"]:
  """Over the real queries of one example's chunk."""
  q = jnp.where(chunk.valid[:, None, None], q, 0.0)
  return q.sum(axis=0) / jnp.maximum(chunk.valid.sum(), 1)


def grouped(layer: Layer, x: Float[Array, "*c h d"]) -> Array:
  """Query heads by key head, `[*c, G, r, D]`."""
  return x.reshape(*x.shape[:-2], layer.kv_heads, layer.group, x.shape[-1])


DENSE = Causal()


@dataclasses.dataclass(frozen=True)
class Retrieval(Causal):
  """Base of the methods.

  A subclass has fields `chunk` and `budget`, and the methods below, all of one
  example. A sliding layer of the model sees its window and retrieves nothing.
  """

  @property
  def chunk(self) -> int:
    """Queries of a prompt that retrieve together."""
    raise NotImplementedError

  @property
  def budget(self) -> Budget:
    """Tokens that are retrieved."""
    raise NotImplementedError

  @property
  def whole(self) -> bool:
    return True

  @property
  def leaves_notes(self) -> str:
    return "memo"

  def with_keep(self, keep: float) -> "Retrieval":
    return dataclasses.replace(self, budget=self.budget.with_keep(keep))

  def counts(self, layer: Layer, n: int):
    """Retrieved tokens of prompts of every length up to n."""
    return layer.ask(budgets.table, self.budget, n)

  def entitled(self, layer: Layer, chunk: Chunk) -> Int[Array, ""]:
    """Retrieved tokens of this example."""
    return jnp.asarray(self.counts(layer, chunk.k.shape[0]))[chunk.prompt]

  def most(self, layer: Layer, n: int) -> int:
    """Their static bound."""
    return int(self.counts(layer, n).max())

  def memo(self, layer: Layer, n: int) -> Memo:
    """What is remembered of n tokens, empty."""
    return ()

  def look(
    self, layer: Layer, chunk: Chunk, memo: Memo
  ) -> tuple[Float[Array, "c h d"], Memo]:
    """Outputs of a chunk, and the memo after it."""
    raise NotImplementedError

  def due(self, chunk: Chunk) -> Bool[Array, ""]:
    """Whether `digest` has something to do."""
    return jnp.zeros((), bool)

  def digest(self, layer: Layer, chunk: Chunk, memo: Memo) -> Memo:
    """What is expensive and rare: run if it is due in any example."""
    return memo

  def batch(
    self, layer: Layer, chunk: Chunk, memo: Memo
  ) -> tuple[Float[Array, "b c h d"], Memo]:
    """`look` and `digest` over a batch."""
    out, memo = jax.vmap(lambda c, m: self.look(layer, c, m))(chunk, memo)
    due = jax.vmap(self.due)(chunk)

    def digest(memo):
      def one(c, m, due):
        new = self.digest(layer, c, m)
        return jax.tree.map(lambda a, b: jnp.where(due, a, b), new, m)

      return jax.vmap(one)(chunk, memo, due)

    return out, jax.lax.cond(due.any(), digest, lambda m: m, memo)

  def __call__(self, layer, arrivals, memory, *, params, carry):
    if layer.window is not None:
      out, carry = DENSE(layer, arrivals, memory, params=params, carry=carry)
      return out, {**carry, NOTES: {"memo": ()}}
    a = arrivals.clean()
    need_whole(self, a, memory)
    b, t = a.valid.shape
    length = a.valid.sum(axis=1, dtype=jnp.int32)
    blocks = -(-t // self.chunk)
    pad = [(0, 0), (0, blocks * self.chunk - t)]
    q = jnp.pad(a.q, [*pad, (0, 0), (0, 0)])
    memo = jax.tree.map(
      lambda x: jnp.broadcast_to(x[None], (b, *x.shape)), self.memo(layer, t)
    )

    def step(memo, start):
      place = start + jnp.arange(self.chunk)
      wide = jnp.broadcast_to(place[None], (b, self.chunk))
      chunk = Chunk(
        jax.lax.dynamic_slice_in_dim(q, start, self.chunk, 1),
        wide,
        wide < length[:, None],
        memory.k,
        memory.v,
        jnp.minimum(length, start + self.chunk),
        length,
      )
      out, memo = self.batch(layer, chunk, memo)
      return memo, out

    memo, out = jax.lax.scan(step, memo, jnp.arange(blocks) * self.chunk)
    out = jnp.moveaxis(out, 0, 1).reshape(b, -1, *out.shape[3:])[:, :t]
    carry = {**carry, NOTES: {"memo": memo}}
    return self.finish(layer, out.astype(layer.dtype), a, params), carry
