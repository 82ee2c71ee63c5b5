"""What a decoder layer and a cache say to each other.

A decoder layer projects its input to queries, keys and values, does *not*
rotate them, and hands them over as `Arrivals`; the cache rotates, attends,
remembers and returns the heads' outputs. A layer therefore never asks which
method it runs. Layers are called one after the other (unrolled, not scanned:
states may differ in shape from layer to layer), and a `carry` goes with them:

    layers = [Layer(index=i, depth=depth, ...) for i in range(depth)]
    slots.check(...)                                   # when the model is built
    states = [cache.init(layer, b, prompt, decode) for layer in layers]

    carry = {}                                         # one call of the model
    for i, layer in enumerate(layers):
      ...                                              # q, k, v from x
      out, states[i], carry = cache.prefill(
        layer, states[i], arrivals, attend=attend, params=params[i],
        carry=carry, last=True)
      ...                                              # out [b, t, H, D] -> W_O

    carry = {}                                         # one decode step, t = 1
    for i, layer in enumerate(layers):
      out, states[i], carry = cache.decode(
        layer, states[i], arrivals, attend=attend, params=params[i],
        carry=carry)

`prefill` may be called several times with chunks of a prompt, `last=True` with
the final one (a static argument): what it returns then is the state that
`decode` takes, of a smaller physical size where the method compresses. Batches
are ragged: padding stands at the end of each prompt (`valid` False), and a
chunk may be all padding for some examples. The forward pass of training, which
remembers nothing, is `attend(layer, arrivals, Memory.of(arrivals), ...)`.

What a layer of attend and cache learns is one dict, `params`, with the keys
"attend" and "cache" as far as there is something (`parameters` makes it; the
model keeps it with its own parameters); both receive the whole dict.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Rotary = Callable[[Array, Array], Array]
State = Any
Params = dict[str, Any]
Carry = dict[Any, Any]
# In the carry, from exact attention of a whole prompt to the cache of the same
# layer: log-sum-exps of the queries' logits, `[b, H, t]`.
LSE = "lse"


@dataclasses.dataclass(frozen=True)
class Layer:
  """Static facts about one attention layer; hashable.

  Attributes:
    index, depth: number of this layer, and how many there are.
    heads, kv_heads: query heads H and key heads G; G divides H and query head
      h reads key head `h // (H // G)`.
    head_dim: D.
    rotary: `(x [*b, t, h, D], position [*b, t]) -> x rotated`, hashable; None:
      keys carry no position.
    scale: factor on the products of queries and keys; None: D ** -0.5.
    soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`.
    window: a query sees keys at distances below it only (sliding layers).
    dtype: of keys and values in the cache.
  """

  index: int = 0
  depth: int = 1
  heads: int = 1
  kv_heads: int = 1
  head_dim: int = 64
  rotary: Rotary | None = None
  scale: float | None = None
  soft_cap: float | None = None
  window: int | None = None
  dtype: Any = jnp.float32

  def __post_init__(self):
    if not 0 <= self.index < self.depth:
      raise ValueError(f"index={self.index}: must lie in 0..{self.depth - 1}")
    if self.kv_heads < 1 or self.heads % self.kv_heads:
      raise ValueError(
        f"heads={self.heads}, kv_heads={self.kv_heads}: key heads must divide"
        " query heads"
      )
    hash(self)

  @property
  def group(self) -> int:
    """Query heads a key head."""
    return self.heads // self.kv_heads

  @property
  def factor(self) -> float:
    """What products of queries and keys are multiplied with."""
    return self.head_dim**-0.5 if self.scale is None else self.scale

  def rotate(
    self, x: Float[Array, "*b t h d"], position: Int[Array, "*b t"]
  ) -> Float[Array, "*b t h d"]:
    """`x` turned to its positions, in its own dtype; itself without rotary."""
    if self.rotary is None:
      return x
    return self.rotary(x, position).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrivals:
  """What one call of a layer brings: t new tokens an example.

  Attributes:
    q: queries before rotation (after query norms, if any), `[b, t, H, D]`.
    k: keys before rotation (after key norms, if any), `[b, t, G, D]`.
    v: values, `[b, t, G, D]`.
    position: of each token in its own text, `[b, t]`.
    valid: False for padding, which stands behind the real tokens, `[b, t]`.
    token: token ids, `[b, t]`; for those that say `needs = ("token",)`.
    x: the attention's input (after its norm), `[b, t, W]`; for those that say
      `needs = ("x",)`.
  """

  q: Float[Array, "*b t h d"]
  k: Float[Array, "*b t g d"]
  v: Float[Array, "*b t g d"]
  position: Int[Array, "*b t"]
  valid: Bool[Array, "*b t"]
  token: Int[Array, "*b t"] | None = None
  x: Float[Array, "*b t w"] | None = None

  def clean(self) -> "Arrivals":
    """The same with zeros in padding, whatever stood there."""
    zero = lambda x: None if x is None else zeroed(x, self.valid)
    return dataclasses.replace(
      self, q=zero(self.q), k=zero(self.k), v=zero(self.v), x=zero(self.x)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
  """Keys and values of the prompt so far, exact and *before* rotation.

  Attributes:
    k, v: zeros in padding, `[b, n, G, D]`.
    position: of each token in its own text, ascending, `[b, n]`.
    valid: False for what has not come yet and for padding, `[b, n]`.
    token, x: as in `Arrivals`, `[b, n]` and `[b, n, W]`, where asked for.
  """

  k: Float[Array, "*b n g d"]
  v: Float[Array, "*b n g d"]
  position: Int[Array, "*b n"]
  valid: Bool[Array, "*b n"]
  token: Int[Array, "*b n"] | None = None
  x: Float[Array, "*b n w"] | None = None

  @classmethod
  def of(cls, arrivals: Arrivals) -> "Memory":
    """A whole prompt in one call: also the forward pass of training."""
    a = arrivals.clean()
    return cls(a.k, a.v, a.position, a.valid, a.token, a.x)


def zeroed(x: Array, valid: Bool[Array, "*b"]) -> Array:
  """`x [*b, ...]` with zeros where not `valid`: NaN times 0 would be NaN."""
  valid = valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim))
  return jnp.where(valid, x, jnp.zeros_like(x))


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

  A frozen, hashable dataclass; the protocol is described in the module. States
  are pytrees whose arrays have the batch as leading axis.
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
class PromptSelect(Protocol):
  """Shortens a prompt within prefill: the `prompt` slot of a decoder.

  After layer `layer` of the prefill of a whole prompt (one chunk), the model
  calls `plan`. With `restart` the kept *token ids* are run through the whole
  model again as a prompt of their own, with positions 0, 1, ... (the states of
  the first pass are thrown away); without, the hidden states after that layer,
  positions, validity and ids move through the plan and the layers above see
  only those. A plan is that of a batch: lift its methods with `jax.vmap`.
  """

  @property
  def restart(self) -> bool: ...

  def at(self, depth: int) -> int:
    """The layer whose arrivals it reads and after which it acts."""
    ...

  def count(self, prompt: int) -> int:
    """How many tokens of a prompt padded to `prompt` remain (static)."""
    ...

  def plan(self, layer: Layer, arrivals: Arrivals) -> Any:
    """`Assignment` of the batch, `[b, m]` of `[b, t]`, in the text's order."""
    ...


def parameters(
  attend: Attend, cache: Cache, layer: Layer, width: int, key: PRNGKeyArray
) -> Params:
  """The `params` of a layer, empty where nothing is learned."""
  made = {
    "attend": attend.parameters(layer, width, jax.random.fold_in(key, 0)),
    "cache": cache.parameters(layer, width, jax.random.fold_in(key, 1)),
  }
  return {name: value for name, value in made.items() if value is not None}
