"""The dense prefill that most caches share, computed once for all of them.

A cache that compresses a prompt after exact attention to all of it changes
nothing in the prefill itself. So the model is run once with a cache that
records what every layer projects, and each such cache is then given these
arrivals, layer by layer, and makes its own state of them. A layer's compression
is a small program of its own; layers whose programs are the same share one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from experiments.sweeps.compiled import Compiled, Compiler, Shapes
from tokjax.cache import workspace
from tokjax.cache.kv import KV, Prompted
from tokjax.layer import LSE, Arrivals, Layer
from tokjax.models import Decoder
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


def compile_states(
  model: Decoder, recorded: Shapes, decode: int, compiler: Compiler
) -> list[Compiled]:
  """For each layer, from what was recorded to the state of a recipe's cache.

  Args:
    model: with a recipe that `shares` the dense prefill.
    recorded: of all layers.
    decode: how many tokens can follow.
    compiler: of the programs.
  """
  cache: Any = KV() if model.slots.cache is None else model.slots.cache
  needs = cache.needs

  def states_of(layer: Layer) -> Callable[[Recorded], Any]:
    def compress(found: Recorded):
      a = found.arrivals
      if "token" not in needs:
        a = dataclasses.replace(a, token=None)
      start = cache.init(layer, *a.valid.shape, decode)
      _, state, carry = cache.prefill(
        layer, start, a, attend=_Known(found.lse), params={}, carry={},
        last=True,
      )  # fmt: skip
      if carry:
        raise ValueError(f"{cache}: hands {list(carry)} on to later layers")
      return state

    return compress

  return [
    compiler(states_of(layer), found)
    for layer, found in zip(model.layers, recorded.parts, strict=True)
  ]


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
