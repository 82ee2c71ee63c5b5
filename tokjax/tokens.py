"""Tokens: a sequence and all that travels with it.

All shapes in this package are those of *one example*; a batch is handled by
`jax.vmap`. Axis letters: `n` tokens, `d` features, `h` heads, `k` head width,
`m` tokens after a plan.
"""

import dataclasses
import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Kind(enum.IntEnum):
  """What a token is. Transforms protect tokens by kind.

  PATCH is a patch in a vision encoder, VISUAL one in a language model; NEWLINE
  ends a row of these.
  """

  PATCH = 0
  CLASS = 1
  DISTILLATION = 2
  REGISTER = 3
  TEXT = 4
  VISUAL = 5
  NEWLINE = 6


PROTECTED = (
  Kind.CLASS, Kind.DISTILLATION, Kind.REGISTER, Kind.TEXT, Kind.NEWLINE
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """A sequence of tokens and all that travels with it.

  Attributes:
    x: features, `[n, d]`.
    size: how many original tokens each one stands for, `[n]`.
    position: coordinates, `[n, p]`: p=1 in a text, 2 on a grid (row, column).
    kind: one of `Kind`, `[n]`.
    mask: True where a token is real, `[n]`; None says that all are. The
      difference is static, so that unpadded batches pay nothing for masks.
    policy: how present a token is, in [0, 1], `[n]`: the soft mask with which
      methods train that gather at inference; None: fully.
  """

  x: Float[Array, "*b n d"]
  size: Float[Array, "*b n"]
  position: Float[Array, "*b n p"]
  kind: Int[Array, "*b n"]
  mask: Bool[Array, "*b n"] | None = None
  policy: Float[Array, "*b n"] | None = None

  @classmethod
  def create(
    cls,
    x: Float[Array, "n d"],
    *,
    position: Float[Array, "n p"] | None = None,
    kind: Int[Array, "n"] | None = None,
    mask: Bool[Array, "n"] | None = None,
  ) -> "Tokens":
    """Tokens of size one; positions default to 0..n-1, kinds to PATCH."""
    n = x.shape[0]
    if position is None:
      position = jnp.arange(n, dtype=jnp.float32)[:, None]
    if kind is None:
      kind = jnp.full((n,), Kind.PATCH, jnp.int32)
    return cls(x, jnp.ones((n,), jnp.float32), position, kind, mask)

  @property
  def num_tokens(self) -> int:
    return self.x.shape[-2]

  def of_kind(self, kinds: Sequence[Kind] = PROTECTED) -> Bool[Array, "*b n"]:
    """True where a token is of one of `kinds` (default: the protected)."""
    hit = jnp.zeros(self.kind.shape, bool)
    for kind in kinds:
      hit |= self.kind == int(kind)
    return hit

  def replace(self, **changes) -> "Tokens":
    return dataclasses.replace(self, **changes)
