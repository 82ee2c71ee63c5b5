"""`KV`: a cache put together from eviction, a store and a read.

    evict   what of the prompt stays, decided once when it is complete
    store   how that is stored: exactly, in few bits, rotated or not
    read    what of it a decoded token attends to
    trim    what goes again while tokens are generated

Parts are independent of each other where that makes sense; what does not is
refused when the model is built.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax import budgets
from tokjax.attention import core
from tokjax.cache import answers as answers_lib
from tokjax.cache import entries as entries_lib
from tokjax.cache import evict as evict_lib
from tokjax.cache import reads
from tokjax.cache.entries import Entries
from tokjax.cache.limits import Limits
from tokjax.cache.prompted import Prompted, refuse_notes
from tokjax.cache.reads import Query, ReadAll
from tokjax.cache.stores import Exact, Parts, Store
from tokjax.cache.trim import Trim
from tokjax.cache.workspace import Workspace
from tokjax.layer import Arrivals, Layer
from tokjax.reduce.reduction import Reduce
from tokjax.signals import Question
from tokjax.slots import Bytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVState:
  """The state of `KV` while tokens are generated.

  Attributes:
    store: of the store.
    index: of the read.
    count, last: what the prompt was entitled to keep and to protect at its
      end, `[b]`; for `trim`.
  """

  store: Any
  index: Any
  count: Int[Array, "b"]
  last: Int[Array, "b"]


@dataclasses.dataclass(frozen=True)
class KV(Prompted):
  """See the module.

  Attributes:
    evict: a reduction whose tokens are the entries of a key head, carried out
      when the prompt is complete; see `tokjax.cache.evict.evicting`.
    store, read, trim: the other parts; `trim` takes its budget and protection
      from `evict`.
  """

  evict: Reduce | None = None
  store: Store = Exact()
  read: ReadAll = ReadAll()
  trim: Trim | None = None

  # What recipes fill one by one, see `tokjax.recipes.compose`.
  parts = ("evict", "store", "read", "trim")

  @property
  def needs(self) -> tuple[str, ...]:
    return answers_lib.needs_of(self.asks)

  @property
  def asks(self) -> tuple[Question, ...]:
    """What is asked of the prompt."""
    own = () if self.evict is None else self.evict.asks
    more = None if self.trim is None else self.trim.remember
    return own if more is None or more in own else (*own, more)

  @property
  def queries(self) -> int | None:
    return answers_lib.queries_of(self.asks)

  def check(self, layer, attend, prompt: int, decode: int) -> None:
    """Raises ValueError for parts that do not go together."""
    self.store.check(layer)
    self.read.check(layer)
    exact = self.store.movable and self.read.dense
    if not exact or attend.leaves_notes in ("memo", "cores", "states"):
      refuse_notes(self, attend)
    answers_lib.queries_of(self.asks)
    if self.evict is not None:
      evict_lib.check(self.evict, layer, prompt)
    if self.trim is not None:
      self.trim.check()
      if self.evict is None and self.trim.evicts:
        raise ValueError("trim= needs evict=, whose budget it keeps to")
      if not self.store.movable:
        raise ValueError(
          f"{type(self.store).__name__} stores tokens in groups, from which"
          " none can be evicted between steps; leave out trim= (evict at the"
          " end of the prompt only) or use Exact()"
        )
      if not self.read.dense:
        raise ValueError(
          f"{type(self.read).__name__} indexes entries by their place, which"
          " trim= changes between steps; use one of the two"
        )
    if self._merges and not self.store.movable:
      raise ValueError(
        "merged entries carry counts, which only Exact() stores; use evict="
        " without merge or store=Exact()"
      )
    if self.read.aligned and self.evict is not None:
      raise ValueError(
        f"{type(self.read).__name__} reads the same places in all heads, which"
        " hold different tokens after evict=; leave out evict=, or use Pages()"
      )
    if not self.read.dense and not self.store.rotated:
      raise ValueError(
        f"{type(self.read).__name__} scores rotated keys; use"
        " Exact(rotated=True)"
      )

  def with_keep(self, keep: float) -> "KV":
    """Eviction or else reading turned to that fraction of the prompt."""
    if self.evict is not None:
      evict = turned(self.evict, keep)
      return dataclasses.replace(self, evict=evict)
    return dataclasses.replace(self, read=self.read.with_keep(keep))

  def room(self, layer: Layer, prompt: int, decode: int) -> int:
    """Places of each head; a sliding layer's store may need fewer."""
    prompt = layer.in_sight(prompt)
    if self.evict is None:
      return prompt + decode
    limits = Limits.of(self.evict, layer, prompt)
    if self.trim is None or not self.trim.evicts:
      return limits.room + decode
    # One place for the token that arrives, and one for the merged entry.
    most = limits.most + self.trim.merge + self.trim.slack + 1
    return min(most, prompt + decode)

  def compress(self, layer: Layer, space: Workspace, notes, params) -> KVState:
    prompt = layer.in_sight(space.prompt)
    length = jnp.minimum(space.length, prompt)
    whole = entries_lib.of_memory(layer, space.memory, self.store.rotated)
    if notes:
      whole = whole.replace(extra=notes)
    count = last = length
    if self.evict is None:
      question = self.trim and self.trim.remembered(layer)
      if question is not None:
        asked = (question,)
        told = answers_lib.of_prompt(layer, space, asked).values[0]
        extra = {**whole.extra, answers_lib.REMEMBERED: told}
        whole = whole.replace(extra=extra)
      whole = entries_lib.newest(whole, prompt)
    else:
      count, last = Limits.of(self.evict, layer, prompt).at(length)
      remember = self.trim and self.trim.remembered(layer)
      whole = evict_lib.evict(self.evict, layer, space, whole, remember)
    room = self.room(layer, space.prompt, space.decode)
    store = self.store.pack(layer, whole, max(room, whole.room))
    view = self.store.view(layer, store)
    index = self.read.build(layer, view, prompt, length)
    return KVState(store, index, count, last)

  def step(self, layer, state: KVState, arrivals, attend, params, carry):
    """Append, trim, read; or append, read, trim."""
    a = arrivals
    if a.q.shape[1] > 1:
      return *self._several(layer, state, a, attend), carry
    position, valid = a.position[:, 0], a.valid[:, 0]
    k = layer.rotate(a.k, a.position) if self.store.rotated else a.k
    trim, store = self.trim, state.store
    if trim is not None:
      # Rules between steps go by the order of the text, which a ring loses.
      store = entries_lib.without_aged(store, layer, position, valid)
    store = self.store.append(
      layer, store, k[:, 0], a.v[:, 0], position, valid
    )
    if trim is not None and trim.arriving is not None:
      score = trim.arriving(a)
      store = entries_lib.stamp(
        store, answers_lib.REMEMBERED, score, valid
      )
    if trim is not None and not trim.after:
      store = self._trimmed(layer, store, state)
    parts = self._parts(layer, store)
    if parts is not None:
      q = core.split(layer.rotate(a.q, a.position), layer.kv_heads)
      out = reads.in_parts(Query(layer, q, position, attend), parts)
      return core.join(out), dataclasses.replace(state, store=store), carry
    entries = self.store.view(layer, store)
    index = self.read.update(layer, state.index, entries, valid)
    q, shown = self._turned(layer, a, entries)
    query = Query(layer, q, position, attend)
    out, weight, carry = self.read(query, shown, index, carry)
    if trim is not None and trim.after:
      if trim.arriving is None:  # Else scores are the tokens' own.
        store = _scored(store, answers_lib.REMEMBERED, weight, valid)
      store = self._trimmed(layer, store, state, weight)
    state = dataclasses.replace(state, store=store, index=index)
    return core.join(out), state, carry

  def _several(
    self, layer: Layer, state: KVState, a: Arrivals, attend
  ) -> tuple[Float[Array, "b t h d"], KVState]:
    """`step` of tokens of which each sees those before it and itself.

    Of caches that `tokjax.cache.several.check` lets pass.
    """
    store = state.store
    k = layer.rotate(a.k, a.position)
    for i in range(a.q.shape[1]):
      store = self.store.append(
        layer, store, k[:, i], a.v[:, i], a.position[:, i], a.valid[:, i]
      )
    entries = self.store.view(layer, store)
    q = core.split(layer.rotate(a.q, a.position), layer.kv_heads)
    query = Query(layer, q, a.position[:, 0], attend)
    seen = core.visible(
      layer, a.position[:, None], entries.position, entries.valid
    )
    logits = query.logits(entries)
    out, _ = query.attention(entries, logits, seen[:, :, None])
    return core.join(out), dataclasses.replace(state, store=store)

  def _parts(self, layer: Layer, store: Any) -> Parts | None:
    """The store in parts, where all of it is read and nothing else asks."""
    if type(self.read) is not ReadAll or self.trim is not None:
      return None
    return self.store.parts(layer, store)

  def _trimmed(
    self, layer: Layer, store: Entries, state: KVState, weight: Any = None
  ) -> Entries:
    if self.trim is None or not self.trim.evicts:
      return store
    first = 0 if self.evict is None else self.evict.free.first
    return self.trim(layer, store, first, state.count, state.last, weight)

  @property
  def _merges(self) -> bool:
    """Whether entries stand for several tokens."""
    return self.evict is not None and evict_lib.merges(self.evict)

  def _turned(
    self, layer: Layer, a: Arrivals, entries: Entries
  ) -> tuple[Float[Array, "b g r 1 d"], Entries]:
    """The query and the keys as they meet."""
    if self.store.rotated:
      q = layer.rotate(a.q, a.position)
      return core.split(q, layer.kv_heads), entries
    q = core.split(a.q, layer.kv_heads)  # [b, G, r, 1, D]
    at = jnp.broadcast_to(a.position[:, :1], entries.length.shape)
    place = entries.position
    if self.store.reindexed and layer.window is not None:
      at, place = entries.length - 1, entries_lib.order(entries)
    elif self.store.reindexed:
      at, place = entries.length - 1, np.arange(place.shape[2])[None, None]
    k = layer.rotate(entries.k[:, :, :, None], place)[:, :, :, 0]
    q = layer.rotate(q[:, :, :, 0][:, :, None], jnp.maximum(at, 0)[:, :, None])[
      :, :, 0
    ][:, :, :, None]
    return q, entries.replace(k=k)

  def bytes(self, layer: Layer, state: KVState) -> Bytes:
    return Bytes(
      self.store.logical(layer, state.store), entries_lib.physical_bytes(state)
    )


def turned(evict: Reduce, keep: float) -> Reduce:
  """Keeps that fraction; a protected end that is part of the budget too."""
  budget = evict.budget.with_keep(keep)
  old, free = evict.budget, evict.free
  if isinstance(old, budgets.Sum) and isinstance(budget, budgets.Sum):
    if free.last == old.b:
      free = dataclasses.replace(free, last=budget.b)
  return dataclasses.replace(evict, budget=budget, free=free)


def _scored(store: Entries, name: str, weight: Array, valid: Array) -> Entries:
  """Adds what the heads of a group attended to a remembered score."""
  if name not in store.extra:
    return store
  more = jnp.where(valid[:, None, None], weight.sum(axis=(2, 3)), 0.0)
  return store.replace(extra={**store.extra, name: store.extra[name] + more})
