"""How a decoded token reads a cache: all of it, or what looks promising.

A read may keep an index of its own next to the entries and may hand a carry
from layer to layer. It never evicts anything. In a sliding layer a read works
on the entries that are held there, which are those of the window, in the order
of a ring.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.decode_attention.merge import merge
from tokjax import budgets, selection
from tokjax.attention import bounds, core
from tokjax.budgets import Budget
from tokjax.cache import entries as entries_lib
from tokjax.cache.entries import Entries
from tokjax.cache.stores import Parts
from tokjax.layer import Carry, Layer


@dataclasses.dataclass(frozen=True)
class Query:
  """A token's query at a layer, and what acts on its attention.

  Attributes:
    layer: static facts.
    q: rotated as the entries are, `[b, G, r, 1, D]`; of several tokens
      `[b, G, r, t, D]`, which see different entries (`KV.step`).
    position: of the token, or the first of them, `[b]`.
    attend: the model's `attend` slot, whose hooks act here too.
  """

  layer: Layer
  q: Float[Array, "b g r t d"]
  position: Int[Array, "b"]
  attend: Any

  def seen(self, entries: Entries) -> Bool[Array, "b g n"]:
    """Entries that count and lie within the layer's window."""
    seen = entries.valid
    if self.layer.window is None:
      return seen
    distance = self.position[:, None, None] - entries.position
    return seen & (distance < self.layer.window)

  def logits(self, entries: Entries) -> Float[Array, "b g r t n"]:
    """With what `attend` and merged entries add to them."""
    x = core.logits(self.layer, self.q, entries.k)
    if "count" in entries.extra:
      count = entries.extra["count"][:, :, None, None]
      x = x + jnp.log(jnp.maximum(count, 1.0))
    bias = self.attend.bias(self.layer, entries.position)
    return x if bias is None else x + bias[:, :, :, None]

  def attention(
    self, entries: Entries, logits: Array, seen: Bool[Array, "b g #r t n"]
  ) -> tuple[Float[Array, "b g r t d"], Float[Array, "b g r t n"]]:
    """Output and weights over the entries that are `seen`."""
    weight = core.softmax(logits, seen)
    weight = self.attend.rescale(self.layer, weight, entries.extra)
    return core.mix(weight, entries.v), weight


@dataclasses.dataclass(frozen=True)
class ReadAll:
  """Reads all entries. The base of the other reads.

  A read that is not `dense` gives no weights of all entries. One that is
  `aligned` reads the same places in all heads, which hold the same tokens then.
  """

  dense = True
  aligned = False

  def check(self, layer: Layer) -> None:
    """Raises ValueError for a layer that cannot be read like this."""

  def with_keep(self, keep: float) -> "ReadAll":
    """Reads about that fraction, where it chooses."""
    return self

  def build(
    self, layer: Layer, entries: Entries, prompt: int, length: Int[Array, "b"]
  ) -> Any:
    """The index of `entries` [b, G, room]; `length` are the prompts'."""
    return None

  def update(
    self, layer: Layer, index: Any, entries: Entries, valid: Bool[Array, "b"]
  ) -> Any:
    """The index after a token was appended where `valid`."""
    return index

  def __call__(
    self, query: Query, entries: Entries, index: Any, carry: Carry
  ) -> tuple[Array, Array | None, Carry]:
    """Output `[b, G, r, 1, D]`, weights `[b, G, r, 1, n]` if dense, carry."""
    seen = query.seen(entries)[:, :, None, None]
    out, weight = query.attention(entries, query.logits(entries), seen)
    return out, weight, carry


def in_parts(query: Query, parts: Parts) -> Float[Array, "b g r 1 d"]:
  """Attention to all entries, of which one part is there at a time."""

  def one(entries):
    seen = query.seen(entries)[:, :, None, None]
    return core.part(query.logits(entries), seen, entries.v)

  each = jax.lax.map(lambda i: one(parts.part(i)), jnp.arange(parts.count))
  join = lambda many, last: jnp.concatenate([many, last[None]])
  return merge(*jax.tree.map(join, each, one(parts.last)))[0]


def take(entries: Entries, index: Int[Array, "b g r m"]) -> Entries:
  """Entries of each query head, heads as examples: `[b, G * r, m]`."""
  b, g, r, m = index.shape

  def one(e, index):
    return e.map(lambda x: x[index], jnp.full(index.shape[:1], m, jnp.int32))

  return entries_lib.over_heads(one, entries, index)


def attend_to(
  query: Query, entries: Entries, index: Array, valid: Array
) -> Float[Array, "b g r 1 d"]:
  """Attention of every query head to its own list of entries.

  Args:
    query: of all heads.
    entries: `[b, G, n]`.
    index, valid: places to read, none twice, `[b, G, r, m]`.
  """
  b, g, r, m = index.shape
  layer = query.layer.replace(kv_heads=query.layer.heads)
  seen = jnp.take_along_axis(query.seen(entries)[:, :, None], index, axis=-1)
  own = take(entries, index)
  flat = own.map(
    lambda x: x.reshape(b, g * r, *x.shape[3:]), own.length.reshape(b, g * r)
  )
  head = dataclasses.replace(
    query, layer=layer, q=query.q.reshape(b, g * r, 1, 1, -1)
  )
  seen = (seen & valid).reshape(b, g * r, 1, 1, m)
  out, _ = head.attention(flat, head.logits(flat), seen)
  return out.reshape(b, g, r, 1, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageIndex:
  """Extremes of the keys of each page, and how many pages are read.

  Attributes:
    low, high: `[b, G, pages, D]`.
    count: pages that each example reads, `[b]`.
  """

  low: Float[Array, "b g p d"]
  high: Float[Array, "b g p d"]
  count: Int[Array, "b"]


@dataclasses.dataclass(frozen=True)
class Pages(ReadAll):
  """The pages whose keys may fit the query best, for each query head (Quest).

  A page's bound is the largest product that a key between its channelwise
  extremes can have with the query. The newest page competes like the others.

  Attributes:
    budget: tokens that are read.
    page: tokens a page.
    least: pages that are always read.
    from_layer: layers below read everything.
  """

  budget: Budget
  page: int = 16
  least: int = 3
  from_layer: int = 2

  dense = False
  bound = staticmethod(bounds.largest_products)

  def with_keep(self, keep: float) -> "Pages":
    return dataclasses.replace(self, budget=self.budget.with_keep(keep))

  def acts(self, index: int, depth: int) -> bool:
    """Whether a layer reads pages."""
    return index >= self.from_layer

  def counts(self, layer: Layer, prompt: int):
    """Pages that prompts of every length up to `prompt` may read."""
    tokens = layer.ask(budgets.table, self.budget, prompt)
    return jnp.asarray(tokens // self.page).clip(self.least)

  def build(self, layer, entries, prompt, length):
    if not layer.ask(self.acts):
      return None
    pages = -(-entries.room // self.page)
    valid = self._of_pages(entries.valid, pages)
    k = self._of_pages(entries.k, pages)
    low, high = bounds.extremes(k, valid)
    return PageIndex(low, high, self.counts(layer, prompt)[length])

  def update(self, layer, index, entries, valid):
    if not layer.ask(self.acts):
      return index
    if layer.window is not None:
      return self._update_ring(index, entries, valid)

    def one(low, high, e, valid):
      at = e.length - 1
      new = e.k[jnp.maximum(at, 0)]
      page = jnp.where(valid, at // self.page, low.shape[0])
      return (
        low.at[page].min(new, mode="drop"),
        high.at[page].max(new, mode="drop"),
      )

    wide = jnp.broadcast_to(valid[:, None], entries.length.shape)
    low, high = entries_lib.over_heads(
      one, index.low, index.high, entries, wide
    )
    return dataclasses.replace(index, low=low, high=high)

  def _update_ring(self, index: PageIndex, entries: Entries, valid: Array):
    """The newest entry may have replaced one: its page is bounded anew."""

    def one(low, high, e, valid):
      age = jnp.where(e.valid, e.position, -1)
      page = jnp.argmax(age) // self.page
      at = page * self.page + jnp.arange(self.page)
      rows = jnp.minimum(at, e.room - 1)
      real = (at < e.room) & e.valid[rows]
      new = bounds.extremes(e.k[rows][None], real[None])
      page = jnp.where(valid, page, low.shape[0])
      put = lambda old, new: old.at[page].set(new[0], mode="drop")
      return put(low, new[0]), put(high, new[1])

    wide = jnp.broadcast_to(valid[:, None], entries.length.shape)
    low, high = entries_lib.over_heads(
      one, index.low, index.high, entries, wide
    )
    return dataclasses.replace(index, low=low, high=high)

  def __call__(self, query, entries, index, carry):
    if not query.layer.ask(self.acts):
      return ReadAll.__call__(self, query, entries, index, carry)
    pages = index.low.shape[2]
    most = min(self.most(query.layer, entries.room), pages)
    scores = entries_lib.over_heads(
      self.bound, query.q[:, :, :, 0], index.low, index.high
    )
    if query.layer.window is not None:
      seen = self._of_pages(query.seen(entries), pages).any(axis=-1)
      scores = jnp.where(seen[:, :, None], scores, -jnp.inf)

    def pick(score, count):
      page, valid = selection.top_k(
        score, most, mask=score > -jnp.inf, count=count
      )
      at = page[:, None] * self.page + jnp.arange(self.page)[None]
      ok = valid[:, None] & (at < entries.room)
      return jnp.minimum(at, entries.room - 1).reshape(-1), ok.reshape(-1)

    over = jax.vmap(jax.vmap(jax.vmap(pick, (0, None)), (0, None)))
    at, valid = over(scores, index.count)
    return attend_to(query, entries, at, valid), None, carry

  def _of_pages(self, x: Array, pages: int) -> Array:
    """`x [b, G, n, ...]` by page, `[b, G, pages, page, ...]`."""
    b, g, n, *rest = x.shape
    pad = [(0, 0), (0, 0), (0, pages * self.page - n)]
    x = jnp.pad(x, [*pad, *[(0, 0)] * len(rest)])
    return x.reshape(b, g, pages, self.page, *rest)

  def most(self, layer: Layer, room: int) -> int:
    """Static bound of the pages read."""
    tokens = layer.ask(budgets.table, self.budget, room)
    return max(int(tokens.max()) // self.page, self.least)
