"""Landmark Attention: one token represents its block (2023).

Every block of the text ends with a landmark token, which the data put there.
A query attends to its own block and to landmarks in one softmax; what a
landmark receives is distributed over the tokens of its block by a softmax of
their own. Checked against llama/llama_mem.py, lm_benchmark (d963e50).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import budgets, selection
from tokjax.attention import core
from tokjax.attention.causal import Causal
from tokjax.attention.retrieval import Retrieval
from tokjax.budgets import Budget
from tokjax.layer import NOTES, Layer


def with_landmarks(
  token: Int[Array, "*b n"], landmark: int, block: int
) -> Int[Array, "*b m"]:
  """A landmark after each `block` tokens; n is a multiple of `block`."""
  *lead, n = token.shape
  if n % block:
    raise ValueError(f"{n} tokens are no multiple of block={block}; pad them")
  rows = token.reshape(*lead, n // block, block)
  marks = jnp.full((*lead, n // block, 1), landmark, token.dtype)
  return jnp.concatenate([rows, marks], axis=-1).reshape(*lead, -1)


def grouped_softmax(
  own: Float[Array, "*a m"],
  own_seen: Bool[Array, "*a m"],
  blocks: Float[Array, "*a p s"],
  blocks_seen: Bool[Array, "*a p"],
) -> tuple[Float[Array, "*a m"], Float[Array, "*a p o"]]:
  """Weights of a query's own block and of the tokens of others.

  Args:
    own: logits of the own block's ordinary tokens.
    own_seen: those that the query sees.
    blocks: logits of other blocks, the landmark last.
    blocks_seen: which blocks take part.
  """
  joint = core.softmax(
    jnp.concatenate([own, blocks[..., -1]], axis=-1),
    jnp.concatenate([own_seen, blocks_seen], axis=-1),
  )
  m = own.shape[-1]
  within = jax.nn.softmax(blocks[..., :-1], axis=-1)
  return joint[..., :m], joint[..., m:, None] * within


@dataclasses.dataclass(frozen=True)
class Landmark(Retrieval):
  """See the module.

  Attributes:
    block: ordinary tokens between landmarks; those stand at the positions
      block, 2 block + 1, ...
    budget: tokens of the blocks that a query head reads, chosen by the fit of
      its query to their landmarks, which then stand right before its own
      block; None: all blocks, at their own positions, as in training.
    rows: queries whose keys are gathered at a time.
  """

  block: int = 63
  budget: Budget | None = None
  rows: int = 8

  def __post_init__(self):
    if self.block < 1:
      raise ValueError(f"block={self.block}: must be 1 or more")

  @property
  def chunk(self) -> int:
    """A block with its landmark."""
    return self.block + 1

  def with_keep(self, keep: float) -> "Landmark":
    return dataclasses.replace(self, budget=budgets.Share(keep))

  def __call__(self, layer, arrivals, memory, *, params, carry):
    if self.budget is not None or layer.window is not None:
      return super().__call__(
        layer, arrivals, memory, params=params, carry=carry
      )
    out, carry = Causal.__call__(
      self, layer, arrivals, memory, params=params, carry=carry
    )
    return out, {**carry, NOTES: {"memo": ()}}

  def weights(self, layer, arrivals, memory):
    """All blocks, without gathering any: the form for training."""
    product = self.products(layer, arrivals, memory)
    seen = self.seen(layer, arrivals, memory)
    n, s = memory.k.shape[1], self.chunk
    more = -n % s
    cut = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)]).reshape(
      *x.shape[:-1], -1, s
    )

    def rows(at):
      x = cut(product(at))  # [b, G, r, c, blocks, s]
      own = arrivals.position[:, at] // s
      number = jnp.arange(x.shape[-2]).reshape(1, 1, 1, 1, -1)
      mine = own[:, None, None, :, None] == number
      earlier = own[:, None, None, :, None] > number
      local = cut(seen(at)[:, None]) & mine[..., None]
      ordinary = jnp.arange(s) < self.block
      local = local & ordinary.reshape((1,) * 5 + (-1,))
      shape = x.shape[:4]
      flat = lambda y: jnp.broadcast_to(y, x.shape).reshape(*shape, -1)
      near, far = grouped_softmax(
        flat(x), flat(local), x, jnp.broadcast_to(earlier, x.shape[:-1])
      )
      far = jnp.pad(far, [(0, 0)] * 5 + [(0, 1)])
      return (near + far.reshape(near.shape))[..., :n]

    return rows

  def look(self, layer, chunk, memo):
    s, n = self.chunk, chunk.k.shape[0]
    pad = [(0, -n % s), (0, 0), (0, 0)]
    cut = lambda x: jnp.pad(x, pad).reshape(-1, s, *x.shape[1:])
    bare, v = cut(chunk.k), cut(chunk.v)
    place = jnp.broadcast_to(jnp.arange(s)[None], bare.shape[:2])
    k = layer.rotate(bare, place)
    most = bare.shape[0]
    count = jnp.int32(most)
    if self.budget is not None:
      most = min(max(self.most(layer, n) // s, 1), most)
      count = jnp.maximum(self.entitled(layer, chunk) // s, 1)
    one = lambda q, place: self.row(
      layer, q, place, bare[:, -1], k, v, most, count
    )
    if chunk.q.shape[0] <= self.rows:
      return jax.vmap(one)(chunk.q, chunk.place), memo
    out = jax.lax.map(
      lambda at: one(*at), (chunk.q, chunk.place), batch_size=self.rows
    )
    return out, memo

  def row(
    self,
    layer: Layer,
    q: Float[Array, "h d"],
    place: Int[Array, ""],
    landmarks: Float[Array, "p g d"],
    k: Float[Array, "p s g d"],
    v: Float[Array, "p s g d"],
    most: int,
    count: Int[Array, ""],
  ) -> Float[Array, "h d"]:
    """One query's output: every head picks its blocks."""
    s, m = self.chunk, self.block
    own, inside = place // s, place % s
    number = jnp.arange(landmarks.shape[0])
    others = jnp.minimum(count, own)
    # All landmarks stand at position 0 while blocks are chosen.
    early = layer.rotate(q[None], (others * s + 1 + inside)[None])[0]

    def head(q, early, g):
      score = landmarks[:, g] @ early
      top = selection.in_order(
        selection.top_k(score, most, mask=number < own, count=count)
      )
      gap = (others - jnp.arange(most + 1)) * s + inside
      # The last slot is always the query's own block.
      gap = jnp.maximum(gap, 0).at[most].set(inside)
      turned = layer.rotate(
        jnp.broadcast_to(q, (most + 1, 1, q.shape[-1])), gap
      )[:, 0]
      index = jnp.append(top.index, own)
      x = jnp.einsum("pd,psd->ps", turned, k[index, :, g])
      x = core.cap(layer, x.astype(jnp.float32) * layer.factor)
      near, far = grouped_softmax(
        x[most, :m], jnp.arange(m) <= inside, x[:most], top.valid
      )
      rows = v[index, :, g].astype(jnp.float32)
      out = jnp.einsum("pm,pmd->d", far, rows[:most, :m])
      return out + near @ rows[most, :m]

    group = jnp.arange(layer.heads) // layer.group
    return jax.vmap(head)(q, early, group)
