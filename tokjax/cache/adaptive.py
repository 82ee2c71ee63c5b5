"""Heads share one budget: ragged storage, flat over the heads of a layer.

What all heads of a layer keep together is known from the configuration, what
each of them keeps is not. The buffer therefore holds entries of all heads one
after the other, each with the number of its head: no head's room is wasted.
In a sliding layer heads compete for entries that are in sight, as in `evict`,
and the buffer is a ring for the heads together.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import budgets, selection
from tokjax.attention import core
from tokjax.budgets import Budget
from tokjax.cache import entries as entries_lib
from tokjax.cache.prompt import Prompt, Scorer, over_prompts
from tokjax.cache.prompted import Prompted, refuse_notes
from tokjax.layer import Layer
from tokjax.plan import Assignment
from tokjax.slots import Bytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flat:
  """Entries of all heads of a layer.

  Attributes:
    k, v: `[b, T, D]`, keys rotated.
    position: in the text, `[b, T]`.
    head: key head of each entry, `[b, T]`.
    length: entries that count, `[b]`.
  """

  k: Float[Array, "*b t d"]
  v: Float[Array, "*b t d"]
  position: Int[Array, "*b t"]
  head: Int[Array, "*b t"]
  length: Int[Array, "*b"]


def shares(
  score: Float[Array, "g n"],
  free: Bool[Array, "n"],
  each: Int[Array, ""],
  room: int,
  alpha: float,
) -> Int[Array, "g"]:
  """How many of its free tokens each head keeps (Ada-KV).

  The best `g * each` of all heads' tokens are counted head by head; a part
  `alpha` of the budget is divided evenly instead. Rounding may lose or add one
  token per head.
  """
  g, n = score.shape
  flat = jnp.where(free[None], score, -jnp.inf).reshape(-1)
  top = selection.top_k(flat, room, mask=flat > -jnp.inf, count=g * each)
  of = jnp.where(top.valid, top.index // n, g)
  count = jnp.zeros((g,), jnp.int32).at[of].add(1, mode="drop")
  even = jnp.floor(each * alpha)
  return jnp.round(count * (1 - alpha) + even).astype(jnp.int32)


def normalised(
  score: Float[Array, "g n"], free: Bool[Array, "n"], each: Int[Array, ""]
) -> Float[Array, "g n"]:
  """Scores times the part of a head's mass that its best `each` tokens hold."""
  score = jnp.where(free[None], score, 0.0)
  order = jnp.sort(score, axis=-1, descending=True)
  within = jnp.arange(score.shape[1]) < each
  best = jnp.where(within[None], order, 0.0).sum(axis=-1, keepdims=True)
  mass = score.sum(axis=-1, keepdims=True)
  return score * best / jnp.where(mass > 0, mass, 1.0)


@dataclasses.dataclass(frozen=True)
class Adaptive(Prompted):
  """Evicts after the prompt, heads competing for the layer's budget.

  Attributes:
    score: of one example's `Prompt`, `[G, n]`.
    budget: what a head keeps on average, the window included.
    window: last tokens that every head keeps; `score` reads their queries.
    alpha: part of the budget that is divided evenly; 1: no competition.
    normalise: whether scores are multiplied, before heads compete, by the part
      of the head's mass that its own best tokens hold.
  """

  score: Scorer
  budget: Budget
  window: int = 32
  alpha: float = 0.2
  normalise: bool = False

  def __post_init__(self):
    if not 0 <= self.alpha <= 1:
      raise ValueError(f"alpha={self.alpha}: must lie in [0, 1]")

  @property
  def queries(self) -> int:
    return self.window

  def with_keep(self, keep: float) -> "Adaptive":
    return dataclasses.replace(self, budget=self.budget.with_keep(keep))

  def check(self, layer, attend, prompt, decode):
    refuse_notes(self, attend)
    kept = layer.ask(self.budget.count, prompt)
    if kept < min(self.window, prompt):
      raise ValueError(
        f"{self.budget} keeps {kept} of {prompt} tokens in layer"
        f" {layer.index}, fewer than the window={self.window} that is"
        " protected; raise the budget or shrink the window"
      )

  def room(self, layer: Layer, prompt: int) -> int:
    """Entries of all heads that any prompt leaves; one a head for rounding."""
    prompt = layer.in_sight(prompt)
    most = layer.ask(budgets.table, self.budget, prompt).max()
    each = min(max(int(most), self.window) + 1, prompt)
    return layer.kv_heads * each

  def chosen(self, prompt: Prompt, count: Int[Array, ""]) -> Bool[Array, "g n"]:
    """Which entries of which heads stay."""
    score, n = self.score(prompt), prompt.length
    place = jnp.arange(score.shape[1])
    real, free = place < n, place < n - self.window
    if prompt.layer.window is not None:
      sight = prompt.layer.window
      real, free = real & (place >= n - sight), free & (place >= n - sight)
      n = jnp.minimum(n, sight)
    each = jnp.maximum(count - self.window, 0)
    if self.normalise:
      score = normalised(score, free, each)
    most = min(self.room(prompt.layer, score.shape[1]), score.size)
    own = shares(score, free, each, most, self.alpha)
    places = jax.vmap(lambda s: selection.places(s, mask=free))(score)
    best = free[None] & (places < own[:, None])
    stays = best | (real & ~free)[None]
    return jnp.where(count >= n, real[None], stays)

  def compress(self, layer, space, notes, params):
    del notes, params  # Refused when the model was built; nothing learned.
    whole = entries_lib.of_memory(layer, space.memory, rotated=True)
    sight = layer.in_sight(space.prompt)
    table = layer.ask(budgets.table, self.budget, sight)
    count = jnp.asarray(table)[jnp.minimum(space.length, sight)]
    stays = over_prompts(layer, space, self.chosen, count)
    b, g, n = stays.shape
    room = self.room(layer, n)

    def one(stays, k, v, position):
      pick = selection.of_mask(stays.reshape(-1), room)
      plan = Assignment.select(pick.index, g * n, pick.valid)
      flat = lambda x: x.reshape(g * n, *x.shape[2:])
      head = pick.index // n
      total = pick.total
      return (
        plan.apply(flat(k)), plan.apply(flat(v)), plan.take(flat(position)),
        head, total,
      )  # fmt: skip

    k, v, position, head, length = jax.vmap(one)(
      stays, whole.k, whole.v, whole.position
    )
    # A head has no more entries in sight than the window, and older ones go.
    most = g * layer.in_sight(space.prompt + space.decode)
    more = min(g * space.decode, max(most - room, 0))
    pad = lambda x: jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))
    return Flat(pad(k), pad(v), pad(position), pad(head), length)

  def step(self, layer, state, arrivals, attend, params, carry):
    a, g = arrivals, layer.kv_heads
    k = layer.rotate(a.k, a.position)[:, 0]  # [b, G, D]
    ring = layer.window is not None
    state = _appended(
      state, k, a.v[:, 0], a.position[:, 0], a.valid[:, 0], ring
    )
    # Every head multiplies all entries and hides those of the others: for a few
    # heads that is faster than sorting entries or adding them up by head.
    q = core.split(layer.rotate(a.q, a.position), g)[:, :, :, 0]
    b, _, r, d = q.shape
    x = core.logits(layer, q.reshape(b, 1, g * r, 1, d), state.k[:, None])
    x = x.reshape(b, g, r, -1)
    bias = attend.bias(layer, state.position[:, None])
    if bias is not None:
      x = x + bias
    place = jax.lax.broadcasted_iota(jnp.int32, state.head.shape, 1)
    seen = place < state.length[:, None]
    if layer.window is not None:
      seen = seen & (a.position - state.position < layer.window)
    own = state.head[:, None] == jnp.arange(g)[None, :, None]
    weight = core.softmax(x, (seen[:, None] & own)[:, :, None])
    out = jnp.einsum("bgrn,bnd->bgrd", weight.astype(state.v.dtype), state.v)
    out = out.astype(layer.dtype).reshape(b, 1, layer.heads, -1)
    return out, state, carry

  def bytes(self, layer, state: Flat) -> Bytes:
    one = sum(
      x.dtype.itemsize * x[0, 0].size
      for x in (state.k, state.v, state.position, state.head)
    )
    return Bytes(
      state.length.astype(jnp.float32) * one,
      entries_lib.physical_bytes(state),
    )


def _appended(state: Flat, k, v, position, valid, ring: bool) -> Flat:
  """One token in every head, where `valid`; a ring's oldest entries go."""

  def one(e, k, v, position, valid):
    g, room = k.shape[0], e.head.shape[0]
    free = e.length + jnp.arange(g)
    if ring:
      there = jnp.arange(room) < e.length
      free = entries_lib.places_for(g, e.position, there)
    at = jnp.where(valid, free, room)
    put = lambda x, new: x.at[at].set(jnp.asarray(new, x.dtype), mode="drop")
    return Flat(
      put(e.k, k), put(e.v, v), put(e.position, jnp.full((g,), position)),
      put(e.head, jnp.arange(g)), jnp.minimum(e.length + g * valid, room),
    )  # fmt: skip

  return jax.vmap(one)(state, k, v, position, valid)
