"""What fills a slot promises the model; how it is called: `tokjax.slots`."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from tokjax.layer import Arrivals, Carry, Layer, Memory, Params

State = Any


class Bytes(NamedTuple):
  """Sizes of a state, apart.

  Attributes:
    logical: bytes of what counts, an example each, `[b]`.
    physical: bytes of the buffers that are really allocated, for the batch.
  """

  logical: Float[Array, "b"]
  physical: int


@runtime_checkable
class Attend(Protocol):
  """How a prompt's queries attend: the `attend` slot of a decoder.

  A frozen, hashable dataclass. `needs` names parts of `Arrivals` that must be
  there ("token", "x").
  """

  @property
  def needs(self) -> tuple[str, ...]: ...

  @property
  def whole(self) -> bool:
    """Whether a prompt has to come in one chunk, as long as its capacity."""
    ...

  def check(self, layer: Layer, prompt: int) -> None:
    """Raises ValueError, with the reason and the fix, for what cannot be."""
    ...

  def parameters(self, layer: Layer, width: int, key: PRNGKeyArray) -> Any:
    """Trained arrays of one layer (None: none); `width` is that of `x`."""
    ...

  def __call__(
    self,
    layer: Layer,
    arrivals: Arrivals,
    memory: Memory,
    *,
    params: Params,
    carry: Carry,
  ) -> tuple[Float[Array, "b t h d"], Carry]:
    """Outputs of the arrivals, which are the last of what is in `memory`."""
    ...


@runtime_checkable
class Cache(Protocol):
  """What is remembered between steps: the `cache` slot of a decoder.

  A frozen, hashable dataclass; when its methods are called: `tokjax.slots`.
  States are pytrees whose arrays have the batch as leading axis.
  """

  @property
  def needs(self) -> tuple[str, ...]: ...

  def check(
    self, layer: Layer, attend: Attend, prompt: int, decode: int
  ) -> None:
    """Raises ValueError, with the reason and the fix, for what cannot be."""
    ...

  def parameters(self, layer: Layer, width: int, key: PRNGKeyArray) -> Any:
    """Trained arrays of one layer, None if there are none."""
    ...

  def init(self, layer: Layer, batch: int, prompt: int, decode: int) -> State:
    """The state before the first token.

    Args:
      layer: where it is.
      batch: number of examples.
      prompt: length that prompts are padded to (static).
      decode: how many tokens can be generated (static).
    """
    ...

  def prefill(
    self,
    layer: Layer,
    state: State,
    arrivals: Arrivals,
    *,
    attend: Attend,
    params: Params,
    carry: Carry,
    last: bool,
  ) -> tuple[Float[Array, "b t h d"], State, Carry]:
    """Takes a chunk of the prompts; the last one yields the decoding state."""
    ...

  def decode(
    self,
    layer: Layer,
    state: State,
    arrivals: Arrivals,
    *,
    attend: Attend,
    params: Params,
    carry: Carry,
  ) -> tuple[Float[Array, "b t h d"], State, Carry]:
    """Takes one token an example; one that is not valid changes nothing."""
    ...

  def bytes(self, layer: Layer, state: State) -> Bytes:
    """Sizes of a decoding state."""
    ...


@runtime_checkable
class EncoderAttend(Protocol):
  """How an encoder's tokens attend: a frozen dataclass or a Linen module.

  Called with queries, keys and values `[b, h, n, k]`, and by keyword `bias`
  `[b, n]` (added to the logits of every key), `mask` `[b, n]` and, where a
  method trains softly, `policy` `[b, n]`. A module that says `complete = True`
  takes no padded input.
  """

  def __call__(self, q: Array, k: Array, v: Array, **where: Any) -> Array: ...


@runtime_checkable
class Program(Protocol):
  """Wraps the whole call of an encoder; for the rare method that is no plan."""

  def __call__(
    self, forward: Callable[..., Any], images: Array, patch_size: int
  ) -> Any: ...

  def with_keep(self, keep: float) -> "Program": ...


def for_decoder(attend: Any) -> bool:
  """Whether something fills the attend slot of a decoder."""
  return isinstance(attend, Attend)


def for_encoder(attend: Any) -> bool:
  """Whether something fills the attend slot of an encoder."""
  return not for_decoder(attend) or getattr(attend, "encoder", False)


def parameters(
  attend: Attend, cache: Cache, layer: Layer, width: int, key: PRNGKeyArray
) -> Params:
  """The `params` of a layer, empty where nothing is learned."""
  made = {
    "attend": attend.parameters(layer, width, jax.random.fold_in(key, 0)),
    "cache": cache.parameters(layer, width, jax.random.fold_in(key, 1)),
  }
  return {name: value for name, value in made.items() if value is not None}
