"""The cache of multi-token states: ends of chunks, and the newest inputs."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.attention import core
from tokjax.attention.multi_token_states import MultiTokenStates
from tokjax.cache import entries as entries_lib
from tokjax.cache.prompted import Prompted
from tokjax.layer import Layer
from tokjax.slots import Bytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MultiTokenState:
  """The state of `MultiTokenCache`.

  Attributes:
    k, v: of the tokens that end chunks, keys rotated, `[b, G, m, D]`.
    x: inputs of the newest tokens, the newest last, `[b, r, w]`: what keys and
      values of the newest tokens are made of.
    length: tokens that there were, `[b]`.
    ends: ends of chunks among them, `[b]`.
  """

  k: Float[Array, "b g m d"]
  v: Float[Array, "b g m d"]
  x: Float[Array, "b r w"]
  length: Int[Array, "b"]
  ends: Int[Array, "b"]


@dataclasses.dataclass(frozen=True)
class MultiTokenCache(Prompted):
  """Keeps what `MultiTokenStates` in the model's `attend` slot looks at.

  Of the chunk that is not complete it keeps inputs, of which the state-space
  models make their states anew at each step; the release would keep the states.
  """

  needs = ("x",)

  def check(self, layer, attend, prompt, decode):
    if not isinstance(attend, MultiTokenStates):
      raise ValueError(
        f"MultiTokenCache() keeps the chunks of MultiTokenStates, but attend="
        f" is {type(attend).__name__}; use KV()"
      )

  def compress(self, layer: Layer, space, notes, params):
    return space, notes["states"]

  def start(self, layer, state, arrivals, attend: MultiTokenStates):
    """The state behind a prompt."""
    space, ends = state
    length = arrivals.valid.sum(axis=1)
    reach = attend.chunk + attend.lead
    at = length[:, None] - reach + jnp.arange(reach)[None]
    x = arrivals.clean().x
    x = jax.vmap(lambda x, i: x[jnp.clip(i, 0, len(x) - 1)])(x, at)
    total = space.prompt + space.decode
    more = -(-total // attend.chunk) + 1 - ends[0].shape[2]
    grown = lambda x: jnp.pad(
      x.astype(layer.dtype), [(0, 0), (0, 0), (0, max(more, 0)), (0, 0)]
    )
    return MultiTokenState(
      grown(ends[0]), grown(ends[1]), jnp.where((at >= 0)[..., None], x, 0.0),
      length, attend.number(layer, length),
    )  # fmt: skip

  def step(self, layer, state, arrivals, attend, params, carry):
    there = arrivals.valid[:, 0]
    grown = jnp.concatenate([state.x[:, 1:], arrivals.x], axis=1)
    x = jnp.where(there[:, None, None], grown, state.x)
    length = state.length + there
    reach, newest = x.shape[1], attend.lead + 1
    place = length[:, None] - reach + jnp.arange(reach)[None]
    k, v = attend.keys_and_values(layer, params["attend"], x, place)
    near = lambda x: core.heads_first(x[:, -newest:])[:, :, None]
    q = core.split(layer.rotate(arrivals.q, arrivals.position), layer.kv_heads)
    at = length[:, None] - 1
    out = attend.attended(
      layer, q, (state.k, state.v),
      attend.seen_ends(layer, at, state.k.shape[2]), (near(k), near(v)),
      (place[:, -newest:] >= 0)[:, None],
    )  # fmt: skip
    # The new token may end a chunk.
    number = attend.number(layer, at[:, 0])
    ends = there & (attend.end(layer, number) == at[:, 0])
    slot = jnp.where(ends, number, state.k.shape[2])
    put = lambda x, new: jax.vmap(
      lambda x, i, new: x.at[:, i].set(new.astype(x.dtype), mode="drop")
    )(x, slot, new[:, -1])
    state = MultiTokenState(
      put(state.k, k), put(state.v, v), x, length, state.ends + ends
    )
    return core.join(out).astype(layer.dtype), state, carry

  def bytes(self, layer: Layer, state: MultiTokenState) -> Bytes:
    item = state.k.dtype.itemsize
    ends = 2 * layer.kv_heads * layer.head_dim * item * state.ends
    inputs = jnp.minimum(state.length, state.x.shape[1]) * (
      state.x.shape[2] * state.x.dtype.itemsize
    )
    return Bytes(
      (ends + inputs).astype(jnp.float32), entries_lib.physical_bytes(state)
    )
