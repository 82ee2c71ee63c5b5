"""The dense prefill that most caches share, computed once for all of them.

A cache that compresses a prompt after exact attention to all of it changes
nothing in the prefill itself. So the model is run once with a cache that
records what every layer projects, and each such cache is then given these
arrivals, layer by layer, and makes its own state of them. A layer's compression
is a small program of its own, which alike layers share.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.sweeps.lowered import Shapes, key_of
from tokjax.cache import workspace
from tokjax.cache.kv import KV
from tokjax.cache.prompted import Prompted
from tokjax.layer import LSE, Arrivals, Layer
from tokjax.models import Decoder
from tokjax.models.shared_programs import Shared
from tokjax.slots import Bytes, Slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recorded:
  """What a layer projected from whole prompts.

  Attributes:
    arrivals: queries, keys and values before rotation, and token ids.
    lse: log-sum-exps of the logits of all queries, `[b, H, n]`, where dense
      attention left them.
  """

  arrivals: Arrivals
  lse: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Recording:
  """A cache whose states are `Recorded`; nothing can be decoded with it."""

  needs: tuple[str, ...] = ("token",)

  def check(self, layer, attend, prompt: int, decode: int) -> None:
    """Any layer can be recorded."""

  def parameters(self, layer: Layer, width: int, key) -> Any:
    """Nothing is learned."""
    return None

  def init(self, layer: Layer, batch: int, prompt: int, decode: int):
    return workspace.start(layer, batch, prompt, decode)

  def prefill(
    self, layer, state, arrivals, *, attend, params, carry, last: bool
  ):
    """Attention to the prompt, which comes in one chunk."""
    space = workspace.add(state, arrivals)
    out, carry = attend(
      layer, arrivals, space.memory, params=params, carry={}
    )
    return out, Recorded(arrivals.clean(), carry.get(LSE)), {}

  def decode(self, layer, state, arrivals, *, attend, params, carry):
    raise NotImplementedError("a recorded prompt is no cache")

  def bytes(self, layer: Layer, state: Recorded) -> Bytes:
    raise NotImplementedError("a recorded prompt is no cache")


RECORDING = Slots(cache=Recording())


@dataclasses.dataclass(frozen=True)
class _Known:
  """Attention whose outcome nobody reads: it is in the record already."""

  lse: Any

  def __call__(self, layer, arrivals, memory, *, params, carry):
    left = {} if self.lse is None else {LSE: self.lse}
    return arrivals.q, {**carry, **left}


def shares(slots: Slots) -> bool:
  """Whether a recipe compresses what a dense prefill has left.

  So do caches without a prefill, parameters or needs of their own, next to
  dense attention and without reductions.
  """
  cache = KV() if slots.cache is None else slots.cache
  return (
    not slots.reduce
    and slots.attend is None
    and isinstance(cache, Prompted)
    and type(cache).prefill is Prompted.prefill
    and type(cache).parameters is Prompted.parameters
    and set(cache.needs) <= set(Recording().needs)
  )


class Compress:
  """For a layer, from what was recorded to the state of a recipe's cache.

  Layers that the recipe treats alike share a compiled program.

  Args:
    model: with a recipe that `shares` the dense prefill.
    tree: structure of what each layer recorded.
    decode: how many tokens can follow.
  """

  def __init__(self, model: Decoder, tree: Any, decode: int):
    self._layers, self._tree, self._decode = model.layers, tree, decode
    self._cache: Any = KV() if model.slots.cache is None else model.slots.cache
    self._shared = Shared(self._state)

  @classmethod
  def of(cls, model: Decoder, recorded: Shapes, decode: int) -> "Compress":
    """`recorded`: of all layers."""
    (tree,) = {part.tree for part in recorded.parts}
    return cls(model, tree, decode)

  def __call__(self, layer: int, found: Recorded) -> Any:
    """The state of a layer's cache."""
    return self._shared(self._layers[layer], jax.tree.leaves(found))

  def keys_of(self, recorded: Shapes) -> tuple[list[str], list[Shapes]]:
    """A key of every layer's program, and the shapes of the states."""
    known: dict[Any, tuple[str, Shapes]] = {}
    found = []
    for layer, part in zip(self._layers, recorded.parts, strict=True):
      call = self._shared.program(layer, part.leaves)
      if call not in known:
        number = Shapes.of(np.int32(layer.index))
        known[call] = key_of(call, number, Shapes.of(part.leaves))
      found.append(known[call])
    return [key for key, _ in found], [out for _, out in found]

  def _state(self, layer: Layer, leaves: list[Any]) -> Any:
    found = self._tree.unflatten(leaves)
    a = found.arrivals
    if "token" not in self._cache.needs:
      a = dataclasses.replace(a, token=None)
    start = self._cache.init(layer, *a.valid.shape, self._decode)
    _, state, carry = self._cache.prefill(
      layer, start, a, attend=_Known(found.lse), params={}, carry={},
      last=True,
    )  # fmt: skip
    if carry:
      raise ValueError(
        f"{self._cache}: hands {list(carry)} on to later layers"
      )
    return state


def size_of(tree: Any) -> int:
  """Bytes of all arrays."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Kept:
  """Results that are computed once, as long as there is room for them.

  Args:
    most: bytes that may be kept; what comes later is computed each time.
  """

  def __init__(self, most: int):
    self._most, self._used = most, 0
    self._found: dict[Any, Any] = {}

  def get(self, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` returns, or returned before for this key."""
    if key in self._found:
      return self._found[key]
    made = make()
    if self._used + size_of(made) <= self._most:
      self._found[key] = made
      self._used += size_of(made)
    return made
