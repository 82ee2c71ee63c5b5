"""Different methods for different layers and for different key heads."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from tokjax.cache.kv import KV
from tokjax.cache.prompted import Prompted
from tokjax.cache.workspace import Workspace
from tokjax.layer import Arrivals, Layer
from tokjax.slots import Bytes


def turned(part: Any, keep: float) -> Any:
  """`part.with_keep(keep)`, or the part where it has nothing to turn."""
  turn = getattr(part, "with_keep", None)
  return part if turn is None else turn(keep)


@dataclasses.dataclass(frozen=True)
class ByLayer:
  """Another cache, or other attention, in some layers.

  Attributes:
    parts: layers and what acts in them, `((0, 1), KV()), ...`.
    otherwise: what acts in the others.
  """

  parts: tuple[tuple[tuple[int, ...], Any], ...]
  otherwise: Any

  def __post_init__(self):
    seen = [layer for layers, _ in self.parts for layer in layers]
    if len(set(seen)) != len(seen):
      raise ValueError(f"parts={self.parts}: a layer is named twice")
    hash(self)

  def of(self, layer: Layer) -> Any:
    """What acts in that layer."""
    return layer.ask(self._in)

  def _in(self, index: int, depth: int) -> Any:
    for layers, part in self.parts:
      if index in layers:
        return part
    return self.otherwise

  @property
  def _all(self) -> tuple[Any, ...]:
    return (self.otherwise, *(part for _, part in self.parts))

  @property
  def needs(self) -> tuple[str, ...]:
    return tuple(sorted({n for part in self._all for n in part.needs}))

  @property
  def whole(self) -> bool:
    return any(part.whole for part in self._all)

  @property
  def per_head(self) -> bool:
    return any(part.per_head for part in self._all)

  @property
  def leaves_notes(self) -> str:
    left = sorted({part.leaves_notes for part in self._all})
    return left[-1]

  def with_keep(self, keep: float) -> "ByLayer":
    parts = tuple((layers, turned(part, keep)) for layers, part in self.parts)
    return ByLayer(parts, turned(self.otherwise, keep))

  def check(self, layer, *args):
    wrong = [i for layers, _ in self.parts for i in layers if i >= layer.depth]
    if wrong:
      raise ValueError(
        f"layers {wrong} are named, but there are {layer.depth}; name layers"
        f" 0..{layer.depth - 1}"
      )
    self.of(layer).check(layer, *args)

  def parameters(self, layer, width, key):
    return self.of(layer).parameters(layer, width, key)

  def init(self, layer, batch, prompt, decode):
    return self.of(layer).init(layer, batch, prompt, decode)

  def prefill(self, layer, state, arrivals, **options):
    return self.of(layer).prefill(layer, state, arrivals, **options)

  def decode(self, layer, state, arrivals, **options):
    return self.of(layer).decode(layer, state, arrivals, **options)

  def bytes(self, layer, state) -> Bytes:
    return self.of(layer).bytes(layer, state)

  def __call__(self, layer, arrivals, memory, **options):
    return self.of(layer)(layer, arrivals, memory, **options)

  def bias(self, layer, position):
    return self.of(layer).bias(layer, position)

  def rescale(self, layer, weight, notes):
    return self.of(layer).rescale(layer, weight, notes)

  def finish(self, layer, out, arrivals, params):
    return self.of(layer).finish(layer, out, arrivals, params)


@dataclasses.dataclass(frozen=True)
class ByHead(Prompted):
  """Other caches for some key heads: buffers of different sizes.

  Attributes:
    parts: caches and fractions or numbers of the key heads they hold, a tuple
      of heads for each layer or one for all, `((0, 3), KV()), ...`.
    otherwise: the cache of the others.
  """

  parts: tuple[tuple[tuple[Any, ...], Prompted], ...]
  otherwise: Prompted = KV()

  def split(self, layer: Layer) -> tuple[tuple[tuple[int, ...], Prompted], ...]:
    """Key heads of this layer and the caches that hold them, none empty."""
    left = set(range(layer.kv_heads))
    found = []
    for heads, part in self.parts:
      if heads and isinstance(heads[0], tuple):
        heads = layer.ask(lambda index, depth, of=heads: of[index])
      wrong = [h for h in heads if h not in left]
      if wrong:
        raise ValueError(
          f"key heads {wrong} of layer {layer.index} are named twice or are"
          f" not among its {layer.kv_heads}"
        )
      left -= set(heads)
      found.append((tuple(heads), part))
    found.append((tuple(sorted(left)), self.otherwise))
    return tuple((heads, part) for heads, part in found if heads)

  @property
  def needs(self) -> tuple[str, ...]:
    every = (self.otherwise, *(part for _, part in self.parts))
    return tuple(sorted({n for part in every for n in part.needs}))

  @property
  def queries(self) -> int | None:
    every = {self.otherwise.queries, *(part.queries for _, part in self.parts)}
    every.discard(0)
    if len(every) > 1:
      raise ValueError(
        "parts look at different numbers of last queries,"
        f" {sorted(every, key=str)}; give them the same window"
      )
    return every.pop() if every else 0

  def with_keep(self, keep: float) -> "ByHead":
    parts = tuple((heads, turned(part, keep)) for heads, part in self.parts)
    return ByHead(parts, turned(self.otherwise, keep))

  def check(self, layer, attend, prompt, decode):
    if attend.per_head:
      raise ValueError(
        f"{type(attend).__name__} tells heads apart, and so does this cache;"
        " their numbers would not agree. Use one of the two"
      )
    for heads, part in self.split(layer):
      part.check(_part_of(layer, heads), attend, prompt, decode)

  def compress(self, layer, space, notes, params):
    del notes  # Refused when the model was built.
    states = []
    for heads, part in self.split(layer):
      own = _part_of(layer, heads)
      states.append(part.compress(own, _space(layer, heads, space), {}, params))
    return tuple(states)

  def step(self, layer, state, arrivals, attend, params, carry):
    out = jnp.zeros_like(arrivals.q)
    states = []
    for (heads, part), old in zip(self.split(layer), state, strict=True):
      own, which = _part_of(layer, heads), _queries(layer, heads)
      some = Arrivals(
        arrivals.q[:, :, which],
        arrivals.k[:, :, jnp.asarray(heads)],
        arrivals.v[:, :, jnp.asarray(heads)],
        arrivals.position,
        arrivals.valid,
        arrivals.token,
        arrivals.x,
      )
      # What a part hands on is for the same heads of later layers.
      key = f"heads {heads}"
      part_out, new, handed = part.step(
        own, old, some, attend, params, carry.get(key, {})
      )
      carry = {**carry, key: handed}
      out = out.at[:, :, which].set(part_out.astype(out.dtype))
      states.append(new)
    return out, tuple(states), carry

  def bytes(self, layer, state) -> Bytes:
    of = [
      part.bytes(_part_of(layer, heads), held)
      for (heads, part), held in zip(self.split(layer), state, strict=True)
    ]
    return Bytes(sum(b.logical for b in of), sum(b.physical for b in of))


def _part_of(layer: Layer, heads: tuple[int, ...]) -> Layer:
  return layer.replace(
    heads=len(heads) * layer.group, kv_heads=len(heads)
  )


def _queries(layer: Layer, heads: tuple[int, ...]):
  r = layer.group
  return jnp.asarray([h * r + i for h in heads for i in range(r)])


def _space(layer: Layer, heads: tuple[int, ...], space: Workspace) -> Workspace:
  """Those heads' part of the prompt."""
  own = jnp.asarray(heads)
  memory = dataclasses.replace(
    space.memory, k=space.memory.k[:, :, own], v=space.memory.v[:, :, own]
  )
  of = _queries(layer, heads)
  lse = None if space.lse is None else space.lse[:, of]
  return dataclasses.replace(space, memory=memory, q=space.q[:, :, of], lse=lse)
