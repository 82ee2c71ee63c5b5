"""PoD: distant tokens' scores come from a lower layer (2024).

Heads of similar attention in adjacent layers form blocks. In a block only the
lowest layer keeps keys of distant tokens; the others take over its products
with them, and attend to near tokens (the first and the last ones) with keys of
their own. From the paper's text (arXiv 2412.02252); no code is public.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax.attention import core
from tokjax.attention.causal import Causal, by_group
from tokjax.cache import entries as entries_lib
from tokjax.cache.kv import KV
from tokjax.cache.prompted import Prompted
from tokjax.layer import Layer
from tokjax.slots import Bytes

CARRY = "distant"


def similarity(p: np.ndarray, q: np.ndarray) -> np.ndarray | np.floating:
  """1 - Jensen-Shannon divergence (base 2) of distributions, last axis."""
  mean = (p + q) / 2

  def divergence(a):
    ratio = np.where(a > 0, a / np.where(mean > 0, mean, 1), 1)
    return (a * np.log2(ratio)).sum(axis=-1)

  return 1 - (divergence(p) + divergence(q)) / 2


def leaders(
  attention: np.ndarray, delta: float = 0.5
) -> tuple[tuple[int, ...], ...]:
  """Which layer each head of each layer takes distant scores from.

  Args:
    attention: of last queries on calibration texts, `[layers, heads, ..., n]`;
      query heads of a key head go under `...`.
    delta: a head joins the block of the layer below if they are as similar,
      on average.
  """
  found = [[0] * attention.shape[1]]
  for layer in range(1, attention.shape[0]):
    alike = similarity(attention[layer - 1], attention[layer])
    alike = alike.reshape(alike.shape[0], -1).mean(axis=-1)
    pairs = zip(alike, found[-1], strict=True)
    found.append([below if s >= delta else layer for s, below in pairs])
  return tuple(tuple(row) for row in found)


def follows(layer: Layer, of: tuple[tuple[int, ...], ...]) -> tuple[bool, ...]:
  """Which key heads of a layer take over scores."""
  if not of:
    return (False,) * layer.kv_heads
  return layer.ask(_follows, layer.kv_heads, of)


def _follows(
  heads: int, of: tuple[tuple[int, ...], ...], index: int, depth: int
) -> tuple[bool, ...]:
  row = of[index] if index < len(of) else ()
  if len(row) != heads or any(not 0 <= lead <= index for lead in row):
    raise ValueError(
      f"leaders[{index}]={row}: must name, for each of {heads} key heads, a"
      f" layer in 0..{index}"
    )
  for head, lead in enumerate(row):
    if lead < index and of[index - 1][head] != lead:
      raise ValueError(
        f"leaders[{index}][{head}]={lead}: blocks have to be of adjacent"
        f" layers, but layer {index - 1} follows {of[index - 1][head]}"
      )
  return tuple(lead < index for lead in row)


@dataclasses.dataclass(frozen=True)
class Following(Causal):
  """How prompts attend; see the module.

  Attributes:
    of: for every layer and key head the layer whose scores it takes over, its
      own number where it takes none, see `leaders`; (): nothing is shared.
    first, recent: near tokens at either end.
    threshold: a query whose near attention is at least this share of the whole
      leaves distant tokens out; None: none does.
  """

  of: tuple[tuple[int, ...], ...] = ()
  first: int = 16
  recent: int = 4080
  threshold: float | None = 0.7

  def check(self, layer, prompt):
    follows(layer, self.of)
    if self.of and len(self.of) != layer.depth:
      raise ValueError(
        f"leaders of {len(self.of)} layers are given for {layer.depth} layers"
      )

  def distant(
    self, place: Int[Array, "*b c"], keys: Int[Array, "*b n"]
  ) -> Bool[Array, "*b c n"]:
    """Tokens that are neither among the first nor among the last ones."""
    gap = place[..., :, None] - keys[..., None, :]
    return (gap >= self.recent) & (keys >= self.first)[..., None, :]

  def combine(
    self,
    layer: Layer,
    own: Float[Array, "b g r c n"],
    lead: Float[Array, "b g r c n"],
    distant: Bool[Array, "b c n"],
    seen: Bool[Array, "b #g #r c n"],
  ) -> tuple[Float[Array, "b g r c n"], Float[Array, "b g r c n"]]:
    """Attention, and the products that higher layers take over."""
    follow = jnp.asarray(follows(layer, self.of))[None, :, None, None, None]
    far = distant[:, None, None]
    x = jnp.where(follow & far, lead, own)
    weight = core.softmax(x, seen)
    if self.threshold is not None:
      near = jnp.where(far, 0.0, weight).sum(axis=-1, keepdims=True)
      alone = follow & (near >= self.threshold)
      only = jnp.where(far, 0.0, weight) / jnp.where(near > 0, near, 1.0)
      weight = jnp.where(alone, only, weight)
    return weight, jnp.where(follow, lead, own)

  def __call__(self, layer, arrivals, memory, *, params, carry):
    a = arrivals.clean()
    q = core.split(layer.rotate(a.q, a.position), layer.kv_heads)
    k = core.heads_first(layer.rotate(memory.k, memory.position))
    lead_q, lead_k = carry.get(CARRY, (q, k))
    seen = self.seen(layer, a, memory)
    v = core.heads_first(memory.v)

    def rows(at):
      place = a.position[:, at]
      weight, _ = self.combine(
        layer,
        core.logits(layer, q[:, :, :, at], k),
        core.logits(layer, lead_q[:, :, :, at], lead_k),
        self.distant(place, memory.position),
        by_group(layer, seen(at)),
      )
      return core.join(core.mix(weight, v))

    out = core.over_rows(rows, a.q.shape[1])
    follow = jnp.asarray(follows(layer, self.of))
    pick = lambda lead, own: jnp.where(
      follow.reshape((1, -1) + (1,) * (own.ndim - 2)), lead, own
    )
    carry = {**carry, CARRY: (pick(lead_q, q), pick(lead_k, k))}
    return self.finish(layer, out, a, params), carry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distant:
  """The state of `SharedKeys`.

  Attributes:
    k: rotated keys of all tokens, of heads that lead, `[b, L, n, D]`.
    near: those of near tokens, of heads that follow: the first ones, then the
      token at place p in slot first + p mod recent, `[b, F, m, D]`.
    v: values of all tokens and heads, `[b, G, n, D]`.
    position: `[b, n]`.
    length: `[b]`.
  """

  k: Float[Array, "*b l n d"]
  near: Float[Array, "*b f m d"]
  v: Float[Array, "*b g n d"]
  position: Int[Array, "*b n"]
  length: Int[Array, "*b"]


# What sliding layers have.
SLIDING = KV()


def _sharing(of: tuple[tuple[int, ...], ...]) -> set[int]:
  """Layers that follow others or are followed."""
  pairs = [(i, lead) for i, row in enumerate(of) for lead in row if lead != i]
  return {layer for pair in pairs for layer in pair}


@dataclasses.dataclass(frozen=True)
class SharedKeys(Prompted):
  """The cache of `Following`: followers keep keys of near tokens only.

  A sliding layer holds its window, whose keys other layers' distant tokens are
  not among: it shares nothing, and has the plain cache.
  """

  def check(self, layer, attend, prompt, decode):
    if not isinstance(attend, Following):
      raise ValueError(
        "SharedKeys drops keys that attend=Following() takes from lower"
        f" layers, but {type(attend).__name__} needs them; use KV()"
      )
    if layer.window is not None and layer.index in _sharing(attend.of):
      raise ValueError(
        f"leaders: layer {layer.index} has window={layer.window} and holds no"
        " more tokens than that, so that it can neither follow nor be followed;"
        f" name {layer.index} as the leader of all of its heads, and no other"
        " layer's"
      )

  def compress(self, layer, space, notes, params):
    del notes
    if layer.window is not None:
      return SLIDING.compress(layer, space, {}, params)
    whole = entries_lib.of_memory(layer, space.memory, rotated=True)
    return entries_lib.with_room(whole, space.prompt + space.decode)

  def start(self, layer, state, arrivals, attend: Following):
    """`attend` says which heads follow, whose keys are dropped."""
    if layer.window is not None:
      return state
    follow = np.asarray(follows(layer, attend.of))
    length, n = state.length[:, 0], state.room
    m = attend.recent
    slot = jnp.arange(m)[None]
    last = length[:, None] - 1
    place = jnp.clip(last - (last - slot) % m, 0, n - 1)
    first = jnp.minimum(jnp.arange(attend.first), n - 1)
    first = jnp.broadcast_to(first[None], (len(length), attend.first))
    at = jnp.concatenate([first, place], axis=1)
    near = jax.vmap(lambda k, at: k[:, at])(
      state.k[:, np.flatnonzero(follow)], at
    )
    return Distant(
      state.k[:, np.flatnonzero(~follow)], near, state.v,
      state.position[:, 0], length,
    )  # fmt: skip

  def step(self, layer, state, arrivals, attend, params, carry):
    a = arrivals
    if layer.window is not None:
      return SLIDING.step(layer, state, a, attend, params, carry)
    follow = np.asarray(follows(layer, attend.of))
    k = core.heads_first(layer.rotate(a.k, a.position))[:, :, 0]
    state = _appended(state, k, core.heads_first(a.v)[:, :, 0], a, follow,
                      attend)  # fmt: skip
    b, _, n, _ = state.v.shape
    q = core.split(layer.rotate(a.q, a.position), layer.kv_heads)
    own = jnp.zeros((*q.shape[:4], n), jnp.float32)
    leads, rest = np.flatnonzero(~follow), np.flatnonzero(follow)
    part = lambda heads: layer.replace(
      heads=len(heads) * layer.group, kv_heads=len(heads)
    )
    if len(leads):
      x = core.logits(part(leads), q[:, leads], state.k)
      own = own.at[:, leads].set(x)
    if len(rest):
      x = core.logits(part(rest), q[:, rest], state.near)
      at = _places(state.length, attend, n)
      wide = jax.vmap(lambda x, at: jnp.zeros((*x.shape[:-1], n)).at[
        ..., at].set(x, mode="drop"))  # fmt: skip
      own = own.at[:, rest].set(wide(x, at))
    place = jnp.arange(n)[None]
    newest = state.length[:, None] - 1
    seen = place < state.length[:, None]
    far = attend.distant(newest, jnp.broadcast_to(place, (b, n)))
    weight, handed = attend.combine(
      layer, own, carry.get(CARRY, own), far, seen[:, None, None, None]
    )
    out = core.join(core.mix(weight, state.v))
    return out, state, {**carry, CARRY: handed}

  def bytes(self, layer, state) -> Bytes:
    if layer.window is not None:
      return SLIDING.bytes(layer, state)
    size = jnp.dtype(layer.dtype).itemsize * layer.head_dim
    leads, rest = state.k.shape[1], state.near.shape[1]
    near = jnp.minimum(state.length, state.near.shape[2])
    total = state.length * (size * (leads + layer.kv_heads) + 4)
    total = total + near * size * rest
    return Bytes(total.astype(jnp.float32), entries_lib.physical_bytes(state))


def _places(length: Array, attend: Following, n: int) -> Int[Array, "b m"]:
  """Places of the near slots; n for slots that hold nothing new."""
  last = length[:, None] - 1
  slot = jnp.arange(attend.recent)[None]
  recent = last - (last - slot) % attend.recent
  first = jnp.arange(attend.first)[None]
  first = jnp.where(first < length[:, None], first, n)
  recent = jnp.where(recent >= attend.first, recent, n)
  return jnp.concatenate([first, recent], axis=1)


def _appended(state: Distant, k, v, a, follow, attend: Following) -> Distant:
  leads, rest = np.flatnonzero(~follow), np.flatnonzero(follow)

  def one(s, k, v, position, valid):
    n = s.position.shape[0]
    at = jnp.where(valid, s.length, n)
    m = attend.first + attend.recent
    slot = attend.first + s.length % attend.recent
    put = lambda x, at, new: x.at[:, at].set(new.astype(x.dtype), mode="drop")
    near = put(s.near, jnp.where(valid, slot, m), k[rest])
    early = valid & (s.length < attend.first)
    near = put(near, jnp.where(early, s.length, m), k[rest])
    return Distant(
      put(s.k, at, k[leads]), near, put(s.v, at, v),
      s.position.at[at].set(position, mode="drop"), s.length + valid,
    )  # fmt: skip

  return jax.vmap(one)(state, k, v, a.position[:, 0], a.valid[:, 0])
