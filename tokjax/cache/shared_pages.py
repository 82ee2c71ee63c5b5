"""Pages that some layers choose for all heads of the layers above (DELTA)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import budgets, selection
from tokjax.budgets import Budget
from tokjax.cache import entries as entries_lib
from tokjax.cache.entries import Entries
from tokjax.cache.persistent import Selecting
from tokjax.cache.reads import Query, ReadAll
from tokjax.layer import Layer

# In the carry of a step, from a selecting layer to those above it: pages, or
# nothing where a layer should have chosen, but could not.
PAGES = "shared pages"
OVERDUE = ()


@dataclasses.dataclass(frozen=True)
class SharedPages(Selecting):
  """All heads read the pages that an earlier layer attended to most (DELTA).

  A selecting layer reads everything. The score of a token is the largest
  attention that any query head pays it, that of a page the sum over its
  tokens. The newest pages are always chosen and count towards the budget; ties
  go to the earlier page. Layers up to the next selecting one read these pages;
  layers below the first one read everything. Sliding layers read their window;
  where one of them is to select, the next layer without a window does it.

  Attributes:
    budget: tokens of the pages that are read, in whole pages, at least
      `newest` of them.
    page: tokens a page.
    newest: last pages that are always read, the one being filled included.
    layers: the selecting layers, as numbers or fractions of the depth.
  """

  budget: Budget
  page: int = 16
  newest: int = 8
  layers: tuple[int | float, ...] = (2, 0.5, 0.79)

  aligned = True

  def __post_init__(self):
    if self.page < 1 or self.newest < 1 or not self.layers:
      raise ValueError(
        f"page={self.page}, newest={self.newest}, layers={self.layers}: pages"
        " and their number must be 1 or more, and a layer has to choose"
      )

  def counts(self, layer: Layer, prompt: int):
    """Pages that prompts of every length up to `prompt` may read."""
    tokens = layer.ask(budgets.table, self.budget, prompt)
    return (tokens // self.page).clip(self.newest)

  def build(self, layer, entries, prompt, length):
    """How many pages each example reads, `[b]`."""
    return jnp.asarray(self.counts(layer, prompt))[length]

  def __call__(self, query, entries, index, carry):
    layer, role = query.layer, query.layer.ask(self.role)
    if layer.window is not None:
      out, weight, carry = ReadAll.__call__(self, query, entries, index, carry)
      if role == "select":
        carry = {**carry, PAGES: OVERDUE}
      return out, weight, carry
    if carry.get(PAGES) == OVERDUE:
      role = "select"
    if role == "follow":
      if PAGES not in carry:
        raise ValueError(
          f"SharedPages: no layer below chose pages for layer {layer.index};"
          f" read with it in layer {self.selecting(layer.depth)[0]} too"
        )
      return attend_to_shared(query, entries, *carry[PAGES]), None, carry
    seen = query.seen(entries)[:, :, None, None]
    out, weight = query.attention(entries, query.logits(entries), seen)
    if role == "read all":
      return out, weight, carry
    most = int(self.counts(layer, entries.room).max())
    chosen = jax.vmap(lambda w, n, count: self.choose(w, n, most, count))(
      weight.max(axis=(1, 2, 3)), entries.length.max(axis=1), index
    )
    return out, weight, {**carry, PAGES: chosen}

  def choose(
    self,
    weight: Float[Array, "n"],
    length: Int[Array, ""],
    most: int,
    count: Int[Array, ""],
  ) -> tuple[Int[Array, "m"], Bool[Array, "m"]]:
    """Places of the tokens in one example's pages, in order.

    Args:
      weight: the largest attention that a head pays each token.
      length: tokens that are there.
      most: static bound of `count`.
      count: pages to be read.
    """
    room = weight.shape[0]
    score = jnp.pad(weight, (0, -room % self.page)).reshape(-1, self.page)
    number = jnp.arange(score.shape[0])
    pages = -(-length // self.page)
    score = jnp.where(number >= pages - self.newest, jnp.inf, score.sum(axis=1))
    page, valid = selection.in_order(
      selection.top_k(
        score, min(most, score.shape[0]), mask=number < pages, count=count
      )
    )
    at = page[:, None] * self.page + jnp.arange(self.page)[None]
    valid = valid[:, None] & (at < length)
    return jnp.minimum(at, room - 1).reshape(-1), valid.reshape(-1)


def attend_to_shared(
  query: Query,
  entries: Entries,
  at: Int[Array, "b m"],
  valid: Bool[Array, "b m"],
) -> Float[Array, "b g r 1 d"]:
  """Attention of all heads to the same places, none of which is there twice."""
  b, m = at.shape
  wide = jnp.broadcast_to(at[:, None], (*entries.length.shape, m))
  take = lambda e, at: e.map(lambda x: x[at], jnp.int32(m))
  own = entries_lib.over_heads(take, entries, wide)
  seen = query.seen(own) & valid[:, None]
  out, _ = query.attention(own, query.logits(own), seen[:, :, None, None])
  return out


def selecting_layers(
  attention: Float[Array, "depth ..."], count: int = 3, apart: int = 4
) -> tuple[int, ...]:
  """Layers to choose pages: where attention is least like the layer below's.

  Likeness is the cosine of the two maps. The third layer is always one of
  them. The paper keeps the others from lying close together, how is not
  public: here they are `apart` layers from each other at least.

  Args:
    attention: of sample texts in every layer, in the mean over heads.
    count: how many layers.
    apart: least distance of two of them.

  Raises:
    ValueError: there are not so many layers so far apart.
  """
  flat = np.asarray(attention, np.float64).reshape(len(attention), -1)
  flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
  change = 1 - (flat[:-1] * flat[1:]).sum(axis=1)
  chosen = [2]
  for layer in 1 + np.argsort(-change, kind="stable"):
    if len(chosen) < count and layer > 2:
      if min(abs(layer - other) for other in chosen) >= apart:
        chosen.append(int(layer))
  if len(chosen) < count or len(flat) < 3:
    raise ValueError(
      f"count={count}, apart={apart}: {len(flat)} layers have no {count} from"
      " the third one on that lie so far apart; lower one of the two"
    )
  return tuple(sorted(chosen))
