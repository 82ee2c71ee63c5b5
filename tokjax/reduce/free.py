"""Which tokens a reduction may touch; the others are protected."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tokjax.budgets import Budget, check_count, table
from tokjax.tokens import Kind, Tokens

ALL = tuple(Kind)


@dataclasses.dataclass(frozen=True)
class Free:
  """The free tokens: of these kinds, without the ends of the sequence.

  Attributes:
    kinds: of the free tokens.
    first, last: so many tokens of these kinds at either end are protected;
      `last` may be a budget of the number of tokens.
    inside: a budget counts the protected ends; False: they come on top.
  """

  kinds: tuple[Kind, ...] = (Kind.PATCH,)
  first: int = 0
  last: int | Budget = 0
  inside: bool = False

  def __post_init__(self):
    kinds = tuple(self.kinds)
    object.__setattr__(self, "kinds", kinds)
    if not kinds:
      raise ValueError("kinds=(): name at least one kind of token")
    check_count(self.first, "first")
    if not isinstance(self.last, Budget):
      check_count(self.last, "last")

  @property
  def whole(self) -> bool:
    """Whether every token of its kinds is free."""
    return not self.first and self.last == 0

  def ends(self, tokens: int, layer: int, depth: int) -> int:
    """How many of `tokens` tokens are protected at the ends."""
    last = self.last
    if isinstance(last, Budget):
      last = last.count(tokens, layer, depth)
    return min(self.first + last, tokens)

  def places(
    self, tokens: Tokens, layer: int = 0, depth: int = 1
  ) -> Bool[Array, "n"]:
    """Where the free tokens of one example are."""
    ours = tokens.of_kind(self.kinds)
    if tokens.mask is not None:
      ours = ours & tokens.mask
    if self.whole:
      return ours
    rank = jnp.cumsum(ours, dtype=jnp.int32) - 1
    total = ours.sum(dtype=jnp.int32)
    last = self.last
    if isinstance(last, Budget):
      last = jnp.asarray(table(last, ours.shape[0], layer, depth))[total]
    return ours & (rank >= self.first) & (rank < total - last)


def first_places(
  where: Bool[Array, "n"], room: int
) -> tuple[Int[Array, "m"], Bool[Array, "m"]]:
  """Places where a condition holds, `room` of them, and which are real."""
  (index,) = jnp.nonzero(where, size=room, fill_value=0)
  total = where.sum(dtype=jnp.int32)
  real = jax.lax.broadcasted_iota(jnp.int32, (room,), 0) < total
  return index.astype(jnp.int32), real
