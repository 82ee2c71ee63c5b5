"""The cache of attention that retrieves: every token, and a method's memo."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.attention.retrieval import Chunk, Memo, Retrieval
from tokjax.cache import entries as entries_lib
from tokjax.cache import workspace
from tokjax.cache.kv import KV, KVState
from tokjax.cache.prompted import Prompted
from tokjax.layer import Memory
from tokjax.slots import Bytes

# What sliding layers have.
SLIDING = KV()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RetrieverState:
  """The state of `Retriever`: every token, before rotation.

  Attributes:
    k, v: `[b, n, G, D]`.
    length: tokens that are there, `[b]`.
    prompt: how many of them are the prompt's, `[b]`.
    memo: the method's.
  """

  k: Float[Array, "b n g d"]
  v: Float[Array, "b n g d"]
  length: Int[Array, "b"]
  prompt: Int[Array, "b"]
  memo: Memo


@dataclasses.dataclass(frozen=True)
class Retriever(Prompted):
  """Keeps everything; tokens read it as the model's `attend` slot retrieves.

  A sliding layer retrieves nothing: it has the plain cache of its window.
  """

  def check(self, layer, attend, prompt, decode):
    if not isinstance(attend, Retrieval):
      raise ValueError(
        f"Retriever reads as attend= retrieves, but {type(attend).__name__}"
        " does not; use KV()"
      )

  def compress(
    self, layer, space: workspace.Workspace, notes, params
  ) -> RetrieverState | KVState:
    if layer.window is not None:
      return SLIDING.compress(layer, space, {}, params)
    m: Memory = space.memory
    grown = lambda x: jnp.pad(
      x, [(0, 0), (0, space.decode)] + [(0, 0)] * (x.ndim - 2)
    )
    return RetrieverState(
      grown(m.k).astype(layer.dtype), grown(m.v).astype(layer.dtype),
      space.length, space.length, notes["memo"],
    )  # fmt: skip

  def start(self, layer, state, arrivals, attend):
    """The method's memo gets room for generated tokens."""
    if layer.window is not None:
      return state
    of = jax.eval_shape(lambda: attend.memo(layer, state.k.shape[1]))
    memo = jax.tree.map(_grown, state.memo, of)
    return dataclasses.replace(state, memo=memo)

  def step(self, layer, state, arrivals, attend, params, carry):
    if layer.window is not None:
      return SLIDING.step(layer, state, arrivals, attend, params, carry)
    a, n = arrivals, state.k.shape[1]
    at = jnp.where(a.valid[:, 0], state.length, n)
    put = jax.vmap(lambda x, at, new: x.at[at].set(new, mode="drop"))
    k = put(state.k, at, a.k[:, 0].astype(state.k.dtype))
    v = put(state.v, at, a.v[:, 0].astype(state.v.dtype))
    length = jnp.minimum(state.length + a.valid[:, 0], n)
    place = jnp.maximum(length - 1, 0)[:, None]
    chunk = Chunk(a.q, place, a.valid, k, v, length, state.prompt)
    out, memo = attend.batch(layer, chunk, state.memo)
    out = out.astype(layer.dtype)
    return out, RetrieverState(k, v, length, state.prompt, memo), carry

  def bytes(self, layer, state) -> Bytes:
    if layer.window is not None:
      return SLIDING.bytes(layer, state)
    one = sum(x[0, 0].size * x.dtype.itemsize for x in (state.k, state.v))
    return Bytes(
      state.length.astype(jnp.float32) * one,
      entries_lib.physical_bytes(state),
    )


def _grown(x: Array, of: jax.ShapeDtypeStruct) -> Array:
  """Zeros behind, up to the shape of one example's memo."""
  pad = [(0, 0)] + [
    (0, big - small) for small, big in zip(x.shape[1:], of.shape, strict=True)
  ]
  return jnp.pad(x, pad)
