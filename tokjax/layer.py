"""What attention and caches are told of a layer, and what a call brings.

A decoder layer projects its input to queries, keys and values, does *not*
rotate them, and hands them over as `Arrivals`; attention and cache rotate,
attend, remember and return the heads' outputs. A layer therefore never asks
which method it runs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Position = Int[Array, "*b t"] | Int[np.ndarray, "*#b t"]
Params = dict[str, Any]
Carry = dict[Any, Any]
Answer = TypeVar("Answer")
# In the carry, from exact attention of a whole prompt to the cache of the same
# layer: log-sum-exps of the queries' logits, `[b, H, t]`.
LSE = "lse"
# In the carry, from attention to the cache of the same layer: what is to be
# stored with each key.
NOTES = "notes"
# In the carry, from attention that learns while it is dense: losses by name, a
# tuple of one a layer; see `tokjax.losses.Told`.
LOSSES = "losses"


@runtime_checkable
class Rotary(Protocol):
  """Rotary positions, hashable; see `tokjax.models.rotary.Rotary`."""

  def __call__(
    self, x: Float[Array, "*b t h d"], position: Position
  ) -> Float[Array, "*b t h d"]:
    """`x` turned to its positions."""
    ...

  def tables(self, features: int, position: Position) -> tuple[Any, Any]:
    """`x * cosine + roll(x, d / 2) * sine` is `x` turned: `[*b, t, d]`."""
    ...


@dataclasses.dataclass(frozen=True)
class Layer:
  """Static facts about one attention layer; hashable.

  Attributes:
    index, depth: number of this layer, and how many there are.
    heads, kv_heads: query heads H and key heads G; G divides H and query head
      h reads key head `h // (H // G)`.
    head_dim: D.
    rotary: positions; None: keys carry none.
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

  def replace(self, **changes: Any) -> "Layer":
    return dataclasses.replace(self, **changes)

  @property
  def key(self) -> int:
    """Tells layers apart as keys of a dictionary; nothing else follows from it.

    Layers that share a compiled program have one key.
    """
    return self.index

  @property
  def number(self) -> int | Int[Array, ""]:
    """`index` for arithmetic: traced where layers share a compiled program."""
    return self.index

  def ask(self, rule: Callable[..., Answer], *args: Any) -> Answer:
    """What `rule(*args, index, depth)` says of this layer; static.

    Layers for which everything that is asked so has the same answer share a
    compiled program (`tokjax.models.shared_programs`). A rule that reads
    `index` itself gets a program for each layer.
    """
    return rule(*args, self.index, self.depth)

  def is_between(self, first: int, last: int) -> bool:
    """Whether it is none of the `first` first and `last` last layers."""
    return self.ask(lambda index, depth: first <= index < depth - last)

  @property
  def group(self) -> int:
    """Query heads a key head."""
    return self.heads // self.kv_heads

  @property
  def factor(self) -> float:
    """What products of queries and keys are multiplied with."""
    return self.head_dim**-0.5 if self.scale is None else self.scale

  def in_sight(self, tokens: int) -> int:
    """How many of that many tokens the last one sees (static)."""
    return tokens if self.window is None else min(tokens, self.window)

  def rotate(
    self, x: Float[Array, "*b t h d"], position: Position
  ) -> Float[Array, "*b t h d"]:
    """`x` turned to its positions, in its own dtype; itself without rotary.

    Positions that never change are NumPy's, see `tokjax.models.rotary`.
    """
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
    hidden: the block's input, before that norm, `[b, t, W]`; for those that say
      `needs = ("hidden",)`.
    kind: of each token, one of `tokjax.tokens.Kind`, `[b, t]`; for those that
      say `needs = ("kind",)`.
    gate: how present each token is for the others, in (0, 1], `[b, t]`: its log
      is added to logits of the key. Of recipes that train softly; None: all
      are.
    gaps: positions may skip numbers, because tokens between these were removed
      (static): a distance is then no difference of places.
  """

  q: Float[Array, "*b t h d"]
  k: Float[Array, "*b t g d"]
  v: Float[Array, "*b t g d"]
  position: Int[Array, "*b t"]
  valid: Bool[Array, "*b t"]
  token: Int[Array, "*b t"] | None = None
  x: Float[Array, "*b t w"] | None = None
  hidden: Float[Array, "*b t w"] | None = None
  kind: Int[Array, "*b t"] | None = None
  gate: Float[Array, "*b t"] | None = None
  gaps: bool = dataclasses.field(default=False, metadata={"static": True})

  def clean(self) -> "Arrivals":
    """The same with zeros in padding, whatever stood there."""
    zero = lambda x: None if x is None else zeroed(x, self.valid)
    return dataclasses.replace(
      self, q=zero(self.q), k=zero(self.k), v=zero(self.v), x=zero(self.x),
      hidden=zero(self.hidden),
    )  # fmt: skip


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


def with_loss(carry: Carry, name: str, loss: Float[Array, ""]) -> Carry:
  """The carry with one layer's loss more."""
  told = carry.get(LOSSES, {})
  return {**carry, LOSSES: {**told, name: (*told.get(name, ()), loss)}}
