"""How entries are stored while tokens are generated, exactly or in few bits.

A store packs the entries that a prompt leaves, takes in new tokens, and shows
what it holds as `Entries`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from tokjax.cache import entries as entries_lib
from tokjax.cache.entries import Entries
from tokjax.layer import Layer


@dataclasses.dataclass(frozen=True)
class Parts:
  """Entries as parts, of which one at a time is shown.

  Attributes:
    count: how many parts `part` gives (static).
    part: from a number to entries `[b, G, m]`.
    last: entries of one part more.
  """

  count: int
  part: Callable[[Int[Array, ""]], Entries]
  last: Entries


@runtime_checkable
class Store(Protocol):
  """A frozen dataclass.

  Attributes:
    rotated: keys are rotated to their positions before they are stored.
    reindexed: keys are rotated when they are read, to their places in the
      cache, and the query to the last place.
    movable: entries can be evicted again.
    extras: entries may carry more than keys, values and positions.
  """

  rotated: bool
  reindexed: bool
  movable: bool

  def check(self, layer: Layer) -> None:
    """Raises ValueError for a layer whose entries cannot be stored so."""
    ...

  def pack(self, layer: Layer, entries: Entries, room: int) -> Any:
    """The store with these entries, `[b, G, m]`, and places for `room`.

    In a sliding layer a store has places for the window and for what it needs
    beyond that, where these are fewer. It is then a ring: a token that comes
    when all are taken replaces the oldest one, which is out of sight.
    """
    ...

  def append(
    self,
    layer: Layer,
    state: Any,
    k: Float[Array, "b g d"],
    v: Float[Array, "b g d"],
    position: Int[Array, "b"],
    valid: Bool[Array, "b"],
  ) -> Any:
    """Takes in one token where `valid`."""
    ...

  def view(self, layer: Layer, state: Any) -> Entries:
    """What is there, `[b, G, n]`."""
    ...

  def parts(self, layer: Layer, state: Any) -> Parts | None:
    """What `view` shows, in parts, where all at once would take much memory.

    Keys are rotated to their positions; None: `view` is to be read.
    """
    ...

  def logical(self, layer: Layer, state: Any) -> Float[Array, "b"]:
    """Bytes of what counts."""
    ...


@dataclasses.dataclass(frozen=True)
class Exact:
  """Full precision; see `Store` for more attributes.

  Attributes:
    ring: sliding layers have room for their window, in which a new entry takes
      the place of the oldest; False: nothing is forgotten, so that tokens can
      be taken back (see `tokjax.cache.several`).
  """

  rotated: bool = True
  reindexed: bool = False
  movable: bool = True
  ring: bool = True

  def __post_init__(self):
    if self.rotated and self.reindexed:
      raise ValueError(
        "reindexed=True: keys can only be rotated to their places if they are"
        " stored before rotation; set rotated=False"
      )

  def check(self, layer: Layer) -> None:
    """Any layer will do."""

  def pack(self, layer: Layer, entries: Entries, room: int) -> Entries:
    room = layer.in_sight(room) if self.ring else room
    return entries_lib.with_room(entries, max(room, entries.room))

  def append(self, layer, state, k, v, position, valid) -> Entries:
    ring = layer.window is not None and self.ring
    return entries_lib.append(state, k, v, position, valid, ring)

  def view(self, layer: Layer, state: Entries) -> Entries:
    return state

  def parts(self, layer: Layer, state: Entries) -> None:
    return None

  def logical(self, layer: Layer, state: Entries) -> Float[Array, "b"]:
    return entries_lib.logical_bytes(state)
