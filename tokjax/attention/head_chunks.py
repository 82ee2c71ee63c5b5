"""Chunks of text that each head picks; see `retrieval`."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import budgets, selection
from tokjax.attention import core
from tokjax.attention.retrieval import Retrieval, grouped
from tokjax.budgets import Budget
from tokjax.layer import Layer


@dataclasses.dataclass(frozen=True)
class HeadChunks(Retrieval):
  """Each head reads the chunks of text that fit its query (LongHeads).

  A chunk of `chunk` tokens is represented, for every query head, by its keys
  weighted by their fit to the mean output of attention within the chunk. A
  query reads the first chunk, its own, the one before, and the best others, as
  if they were adjacent: no distance exceeds what is read. Checked against
  modeling_longheads/modeling_llama.py (1c9f72e).

  Attributes:
    budget: tokens that are read, in whole chunks, three at least.
    chunk: tokens a chunk.
    rows: queries whose keys are gathered at a time.
  """

  budget: Budget = budgets.Count(4096)
  chunk: int = 256
  rows: int = 8

  def numbers(self, layer: Layer, n: int):
    """Chunks that prompts of every length up to n read."""
    return jnp.asarray(self.counts(layer, n) // self.chunk).clip(3)

  def memo(self, layer, n):
    """Chunk keys, and the queries of the chunk that is not complete."""
    chunks = -(-n // self.chunk)
    shape = (layer.heads, layer.head_dim)
    return (
      jnp.zeros((chunks, *shape), jnp.float32),
      jnp.zeros((self.chunk, *shape), jnp.float32),
    )

  def look(self, layer, chunk, memo):
    keys, queries = memo
    w, n = self.chunk, chunk.k.shape[0]
    most = max(self.most(layer, n) // w, 3)
    most = min(most, keys.shape[0])
    count = self.numbers(layer, n)[chunk.prompt]
    pad = [(0, -n % w), (0, 0), (0, 0)]
    k, v = (jnp.pad(x, pad) for x in (chunk.k, chunk.v))
    # Rotated within its own chunk; how far the chunk is from a query, the
    # query's rotation says.
    k = layer.rotate(k, jnp.arange(k.shape[0]) % w)
    cut = lambda x: x.reshape(-1, w, *x.shape[1:])
    one = lambda q, place: self.row(
      layer, q, place, keys, cut(k), cut(v), most, count
    )
    c = chunk.q.shape[0]
    if c <= self.rows:
      out = jax.vmap(one)(chunk.q, chunk.place)
    else:
      out = jax.lax.map(
        lambda at: one(*at), (chunk.q, chunk.place), batch_size=self.rows
      )
    at = jnp.where(chunk.valid, chunk.place % w, w)
    queries = queries.at[at].set(chunk.q.astype(jnp.float32), mode="drop")
    return out, (keys, queries)

  def row(
    self,
    layer: Layer,
    q: Float[Array, "h d"],
    place: Int[Array, ""],
    keys: Float[Array, "m h d"],
    k: Float[Array, "m w g d"],
    v: Float[Array, "m w g d"],
    most: int,
    count: Int[Array, ""],
  ) -> Float[Array, "h d"]:
    """One query's output: every head picks its chunks."""
    w, own = self.chunk, place // self.chunk
    number = jnp.arange(keys.shape[0])
    forced = (number == 0) | (number >= own - 1)
    score = jnp.einsum("hd,mhd->hm", q.astype(jnp.float32), keys)
    score = jnp.where(forced[None], jnp.inf, score)

    def pick(score):
      top = selection.top_k(score, most, mask=number <= own, count=count)
      top = selection.in_order(top)
      return top.index, top.valid, top.total

    index, valid, total = jax.vmap(pick)(score)
    gap = (total[:, None] - 1 - jnp.arange(most)[None]) * w + place % w
    spread = jnp.broadcast_to(q[:, None, None], (*index.shape, 1, q.shape[-1]))
    turned = layer.rotate(spread, jnp.maximum(gap, 0))[:, :, 0]
    head = jnp.arange(layer.heads) // layer.group

    def attend(q, index, valid, head):
      x = jnp.einsum("sd,swd->sw", q, k[index, :, head])
      x = core.cap(layer, x.astype(jnp.float32) * layer.factor)
      at = index[:, None] * w + jnp.arange(w)[None]
      seen = valid[:, None] & (at <= place)
      weight = core.softmax(x.reshape(-1), seen.reshape(-1))
      return weight.astype(v.dtype) @ v[index, :, head].reshape(-1, v.shape[-1])

    return jax.vmap(attend)(turned, index, valid, head)

  def due(self, chunk):
    """A chunk of text is complete."""
    return (chunk.now % self.chunk == 0) & chunk.valid.any()

  def digest(self, layer, chunk, memo):
    """Its chunk keys."""
    keys, queries = memo
    w = self.chunk
    number = jnp.maximum(chunk.now // w - 1, 0)
    part = lambda x: jax.lax.dynamic_slice_in_dim(
      x, jnp.minimum(number * w, x.shape[0] - w), w
    )
    if chunk.k.shape[0] < w:
      return memo
    k = layer.rotate(part(chunk.k), jnp.arange(w)).astype(jnp.float32)
    q = layer.rotate(queries, jnp.arange(w))
    x = layer.factor * jnp.einsum("tgrd,sgd->grts", grouped(layer, q), k)
    weight = jax.nn.softmax(core.cap(layer, x), axis=-1).mean(axis=2)
    centre = jnp.einsum("grs,sgd->grd", weight, part(chunk.v))
    fit = layer.factor * jnp.einsum("grd,sgd->grs", centre, k)
    key = jnp.einsum("grs,sgd->grd", jax.nn.softmax(fit, axis=-1), k)
    return keys.at[number].set(key.reshape(keys.shape[1:])), queries
