"""Chunks of text that each head picks; see `retrieval`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import budgets, selection
from tokjax.attention import core
from tokjax.attention.causal import by_group, with_others
from tokjax.attention.retrieval import Chunk, Retrieval, grouped
from tokjax.budgets import Budget
from tokjax.layer import Layer

# Chunks that every query reads: the first one, its own, and the one before.
ALWAYS = 3
# Chunks of a prompt up to which products with all of them take the place of
# fetching those that each query and head picks. A prompt of 4096 tokens, 16
# chunks of which 5 are picked, took half of its time on a CPU, one of 2048, 8
# and 1, four fifths; more of them multiply ever more keys that nobody picks.
WIDE = 32


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
    """Chunks that prompts of every length up to n read.

    By NumPy: budgets that come to the same make the same program.
    """
    return jnp.asarray((self.counts(layer, n) // self.chunk).clip(ALWAYS))

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
    pad = [(0, -n % w), (0, 0), (0, 0)]
    k, v = (jnp.pad(x, pad) for x in (chunk.k, chunk.v))
    k, v = (x.reshape(-1, w, *x.shape[1:]) for x in (k, v))
    own = chunk.place[0] // w
    total = jnp.minimum(self.numbers(layer, n)[chunk.prompt], own + 1)
    found = self.always(layer, chunk, k, v, own, total)
    most = min(self.most(layer, n) // w, keys.shape[0]) - ALWAYS
    out = found[0]
    if most > 0:
      best = self.best(layer, chunk, keys, k, v, own, total, most)
      out = with_others(found, best)
    at = jnp.where(chunk.valid, chunk.place % w, w)
    queries = queries.at[at].set(chunk.q.astype(jnp.float32), mode="drop")
    return out[0], (keys, queries)

  def always(
    self,
    layer: Layer,
    chunk: Chunk,
    k: Float[Array, "m w g d"],
    v: Float[Array, "m w g d"],
    own: Int[Array, ""],
    total: Int[Array, ""],
  ) -> tuple[Float[Array, "1 c h d"], Float[Array, "1 h c"]]:
    """Attention to the chunks that every query and head reads, and its LSE.

    Args:
      layer, chunk: the queries, which are in one chunk of text.
      k, v: chunks of text.
      own: number of the queries' chunk.
      total: how many chunks are read.
    """
    w = self.chunk
    number = jnp.stack([jnp.zeros_like(own), own - 1, own])
    there = jnp.stack([own >= 2, own >= 1, own >= 0])
    number = jnp.maximum(number, 0)
    gap = jnp.stack([total - 1, jnp.ones_like(total), jnp.zeros_like(total)])
    x = jnp.concatenate(
      [
        core.logits_of_example(layer, q, one, np.arange(w))
        for q, one in zip(
          self.turned(layer, chunk, gap), k[number], strict=True
        )
      ],
      axis=-1,
    )
    place = (number[:, None] * w + jnp.arange(w)[None]).reshape(-1)
    seen = jnp.repeat(there, w)[None] & (place[None] <= chunk.place[:, None])
    values = v[number].reshape(1, -1, *v.shape[2:])
    return core.joined_part(
      x[None], seen[None, None, None], core.heads_first(values)
    )

  def turned(self, layer: Layer, chunk: Chunk, gap: Int[Array, "j"]) -> Array:
    """Queries as far behind the first token of chunks as those are away.

    `[j, c, H, D]` of `gap [j]`, in chunks.
    """
    far = gap[:, None] * self.chunk + chunk.place[None] % self.chunk
    return jax.vmap(lambda at: layer.rotate(chunk.q, at))(jnp.maximum(far, 0))

  def best(
    self,
    layer: Layer,
    chunk: Chunk,
    keys: Float[Array, "m h d"],
    k: Float[Array, "m w g d"],
    v: Float[Array, "m w g d"],
    own: Int[Array, ""],
    total: Int[Array, ""],
    most: int,
  ) -> tuple[Float[Array, "1 c h d"], Float[Array, "1 h c"]]:
    """Attention to the chunks that heads pick for each query, and its LSE.

    Args: as of `always`, and
      keys: of chunks of text.
      most: how many are picked at most.
    """
    number = jnp.arange(keys.shape[0])
    free, count = (number > 0) & (number < own - 1), total - ALWAYS
    turned = self.turned(layer, chunk, total - 2 - jnp.arange(most))

    def pick(score):
      top = selection.top_k(score, most, mask=free, count=count)
      return selection.in_order(top)

    score = jnp.einsum("chd,mhd->chm", chunk.q.astype(jnp.float32), keys)
    picked = jax.vmap(jax.vmap(pick))(score)  # [c, H, p]
    if len(chunk.q) <= self.rows or len(keys) > WIDE:
      return self.gathered(layer, turned, picked, k, v)
    return self.masked(layer, turned, picked, k, v)

  def gathered(
    self,
    layer: Layer,
    turned: Float[Array, "p c h d"],
    picked: selection.Selection,
    k: Float[Array, "m w g d"],
    v: Float[Array, "m w g d"],
  ) -> tuple[Float[Array, "1 c h d"], Float[Array, "1 h c"]]:
    """Attention to chunks that are fetched for each query and head.

    Args:
      layer: static facts.
      turned: queries as they meet the chunk that is picked first, second, ...
      picked: numbers of chunks, `[c, H, p]`.
      k, v: chunks of text.
    """
    head = jnp.arange(layer.heads) // layer.group
    few, place = turned.shape[1] <= self.rows, np.arange(self.chunk)
    if not few:  # Else less is fetched than there is.
      k, place = layer.rotate(k, place[None]), None

    def row(at):
      index, valid, turned = at
      of = lambda x: jax.vmap(lambda index, g: x[index, :, g])(index, head)
      fetched = jnp.swapaxes(of(k), 0, 1)  # [p, H, w, D]
      x = core.logits(layer, turned[:, :, None, None], fetched, place)
      x = jnp.swapaxes(x[:, :, 0, 0], 0, 1)
      seen = jnp.broadcast_to(valid[..., None], x.shape)
      wide = lambda x: x.reshape(1, layer.heads, 1, 1, -1)
      values = of(v).reshape(1, layer.heads, -1, v.shape[-1])
      out, lse = core.part(wide(x), wide(seen), values)
      return out[0, :, 0, 0], lse[0, :, 0, 0]

    at = picked.index, picked.valid, jnp.swapaxes(turned, 0, 1)
    if few:
      out, lse = jax.vmap(row)(at)
    else:
      out, lse = jax.lax.map(row, at, batch_size=self.rows)
    return out[None], lse.T[None]

  def masked(
    self,
    layer: Layer,
    turned: Float[Array, "p c h d"],
    picked: selection.Selection,
    k: Float[Array, "m w g d"],
    v: Float[Array, "m w g d"],
  ) -> tuple[Float[Array, "1 c h d"], Float[Array, "1 h c"]]:
    """The same by products with all chunks; see `gathered`."""
    m, w = k.shape[:2]
    k = layer.rotate(k, np.arange(w)[None])
    number = jnp.where(picked.valid, picked.index, m)
    flat = lambda x: x.reshape(m * w, *x.shape[2:])
    chosen = jax.nn.one_hot(number, m, dtype=bool)  # [c, H, p, m]

    def wide(here):
      """`[c, H, m]` for each key of the chunks, `[G, r, c, n]`."""
      here = by_group(layer, jnp.swapaxes(here, 0, 1)[None])[0]
      return jnp.repeat(here, w, axis=-1)

    def add(x, at):
      turned, here = at
      new = core.logits_of_example(layer, turned, flat(k))
      return jnp.where(wide(here), new, x), None

    seen = wide(chosen.any(axis=2))
    x = jnp.zeros(seen.shape, jnp.float32)
    x, _ = jax.lax.scan(add, x, (turned, jnp.moveaxis(chosen, 2, 0)))
    values = core.heads_first(flat(v)[None])
    return core.joined_part(x[None], seen[None], values)

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
    k = layer.rotate(part(chunk.k), np.arange(w)).astype(jnp.float32)
    q = layer.rotate(queries, np.arange(w))
    x = layer.factor * jnp.einsum("tgrd,sgd->grts", grouped(layer, q), k)
    weight = jax.nn.softmax(core.cap(layer, x), axis=-1).mean(axis=2)
    centre = jnp.einsum("grs,sgd->grd", weight, part(chunk.v))
    fit = layer.factor * jnp.einsum("grd,sgd->grs", centre, k)
    key = jnp.einsum("grs,sgd->grd", jax.nn.softmax(fit, axis=-1), k)
    return keys.at[number].set(key.reshape(keys.shape[1:])), queries
