"""The cache of core context attention: recent tokens, and a core a group."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import budgets
from tokjax.attention import core
from tokjax.attention.core_context import CoreContext
from tokjax.cache import entries as entries_lib
from tokjax.cache import workspace
from tokjax.cache.kv import KV, KVState
from tokjax.cache.prompted import Prompted
from tokjax.layer import Layer
from tokjax.slots import Bytes

# What sliding layers have.
SLIDING = KV()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CoresState:
  """The state of `Cores`.

  Attributes:
    k, v: of the newest tokens, before rotation, token number i at i modulo r,
      `[b, r, G, D]`.
    position: of those, `[b, r]`.
    core_k, core_v: of all complete groups, rotated, `[b, G, H / G, m, D]`.
    length: tokens that there were, `[b]`.
    groups: complete groups among them, `[b]`.
    local: tokens that a query sees exactly, at least, `[b]`.
  """

  k: Float[Array, "b r g d"]
  v: Float[Array, "b r g d"]
  position: Int[Array, "b r"]
  core_k: Float[Array, "b g h m d"]
  core_v: Float[Array, "b g h m d"]
  length: Int[Array, "b"]
  groups: Int[Array, "b"]
  local: Int[Array, "b"]


@dataclasses.dataclass(frozen=True)
class Cores(Prompted):
  """Keeps what `CoreContext` in the model's `attend` slot still looks at.

  A token that is in no query's reach any more is in its group's core alone. A
  sliding layer has the plain cache of its window.
  """

  def check(self, layer, attend, prompt, decode):
    if not isinstance(attend, CoreContext):
      raise ValueError(
        f"Cores() keeps the cores of CoreContext, but attend= is"
        f" {type(attend).__name__}; use KV()"
      )

  def compress(self, layer, space: workspace.Workspace, notes, params):
    if layer.window is not None:
      return SLIDING.compress(layer, space, {}, params)
    return space, notes["cores"]

  def start(self, layer: Layer, state, arrivals, attend: CoreContext):
    """The state behind a prompt."""
    if layer.window is not None:
      return state
    space, (core_k, core_v) = state
    memory, length = space.memory, space.length
    room = min(attend.most(layer, space.prompt), space.prompt + space.decode)
    at = _places(length, room)
    own = lambda x: jax.vmap(lambda x, i: x[jnp.clip(i, 0, len(x) - 1)])(x, at)
    groups = max((space.prompt + space.decode) // attend.group, 1)
    more = [(0, 0)] * 3 + [(0, groups - core_k.shape[3]), (0, 0)]
    grown = lambda x: jnp.pad(x.astype(layer.dtype), more)
    local = budgets.counts(attend.local, layer, memory.valid)
    return CoresState(
      own(memory.k).astype(layer.dtype), own(memory.v).astype(layer.dtype),
      own(memory.position), grown(core_k), grown(core_v), length,
      length // attend.group, local,
    )  # fmt: skip

  def step(self, layer, state, arrivals, attend, params, carry):
    if layer.window is not None:
      return SLIDING.step(layer, state, arrivals, attend, params, carry)
    a, there = arrivals, arrivals.valid[:, 0]
    state = _appended(layer, state, a, there)
    place = state.length - 1
    state = _grouped(layer, attend, state, a.q, place, there)
    early = attend.early(place, state.local)
    at = _places(state.length, state.k.shape[1])
    seen = (at >= early[:, None] * attend.group) & (at >= 0)
    number = jnp.arange(state.core_k.shape[3])[None]
    k = core.heads_first(layer.rotate(state.k, state.position))
    out = attend.attended(
      layer, core.split(layer.rotate(a.q, a.position), layer.kv_heads),
      (state.core_k, state.core_v), (number < early[:, None])[:, None],
      k, core.heads_first(state.v), seen[:, None],
    )  # fmt: skip
    return core.join(out).astype(layer.dtype), state, carry

  def bytes(self, layer: Layer, state: CoresState | KVState) -> Bytes:
    if isinstance(state, KVState):
      return SLIDING.bytes(layer, state)
    item = 2 * layer.head_dim * state.k.dtype.itemsize
    tokens = jnp.minimum(state.length, state.k.shape[1]) * layer.kv_heads
    logical = item * (tokens + state.groups * layer.heads)
    return Bytes(
      logical.astype(jnp.float32), entries_lib.physical_bytes(state)
    )


def _places(length: Int[Array, "b"], room: int) -> Int[Array, "b r"]:
  """Number of the newest token in each slot; negative: none."""
  last = length[:, None] - 1
  return last - (last - jnp.arange(room)[None]) % room


def _appended(layer, state: CoresState, a, there) -> CoresState:
  """With one token more; what is not `there` changes nothing."""
  room = state.k.shape[1]
  slot = jnp.where(there, state.length % room, room)
  put = lambda x, new: jax.vmap(
    lambda x, i, new: x.at[i].set(new.astype(x.dtype), mode="drop")
  )(x, slot, new[:, 0])
  return dataclasses.replace(
    state, k=put(state.k, a.k), v=put(state.v, a.v),
    position=put(state.position, a.position), length=state.length + there,
  )  # fmt: skip


def _grouped(layer, attend, state: CoresState, q, place, there) -> CoresState:
  """With a core for the group that the token at `place` completes, if any."""
  s, room = attend.group, state.k.shape[1]
  slot = (place[:, None] - s + 1 + jnp.arange(s)[None]) % room
  own = lambda x: core.taken(x, slot)[:, None]
  made = attend.cores(
    layer, q, own(state.k), own(state.v), own(state.position)
  )
  groups = state.core_k.shape[3]
  complete = there & ((place + 1) % s == 0)
  number = jnp.where(complete, place // s, groups)
  put = lambda x, new: jax.vmap(
    lambda x, i, new: x.at[:, :, i].set(new.astype(x.dtype), mode="drop")
  )(x, number, new[:, :, :, 0])
  return dataclasses.replace(
    state,
    core_k=put(state.core_k, made[0]),
    core_v=put(state.core_v, made[1]),
    groups=state.groups + complete,
  )
