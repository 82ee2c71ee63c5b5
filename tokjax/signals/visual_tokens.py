"""Questions about visual tokens: what a vision-language model says of them.

They are asked in its language model, and answered before that runs.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from tokjax.signals.questions import Question


@dataclasses.dataclass(frozen=True)
class _BeforeBlocks(Question):
  """Asked in a language model, answered before its first block."""

  axes: ClassVar = (0,)

  def at(self, block: int, depth: int) -> int:
    return 0


@dataclasses.dataclass(frozen=True)
class Seen(_BeforeBlocks):
  """What an encoder said about the patch of each visual token, `[n]`.

  Zeros for tokens that are no patches.

  Attributes:
    question: of the encoder. Its layer counts from the last block that runs;
      heads that it leaves are averaged.
    ahead: the block ahead of the features answers, see
      `tokjax.models.vlm_ahead`.
    by: hashable; from the answer about one image, class token included, to a
      number for each of its tokens; None: the answer is that.
  """

  question: Question = Question()
  ahead: bool = False
  by: Callable[[Array], Array] | None = None


@dataclasses.dataclass(frozen=True)
class Origin(_BeforeBlocks):
  """Where visual tokens come from, `[n, 8]`; see `Origins`."""


@dataclasses.dataclass(frozen=True)
class Recalled(_BeforeBlocks):
  """What earlier prompts said of each visual token, `[n]`; zeros: nothing.

  It comes with a prompt, see `tokjax.models.vlm.Prompts`; a decoder by itself
  is told nothing.
  """


@dataclasses.dataclass(frozen=True)
class Merged(_BeforeBlocks):
  """Which visual tokens the encoder made one and gave back as copies, `[n]`.

  Members of one have the same number in a prompt; -1: no visual token.
  """


class Origins(NamedTuple):
  """An answer to `Origin` in its parts, -1 for tokens that are no patches.

  Attributes:
    image: number of the image in its prompt, `[n]`.
    crop: 0 for the whole image, then its crops row by row.
    row, column: in the grid of the crop.
    high, wide: how many crops an image has in rows and columns; 0: none.
    rows, columns: sides of the grid of a crop.
  """

  image: Int[Array, "n"]
  crop: Int[Array, "n"]
  row: Int[Array, "n"]
  column: Int[Array, "n"]
  high: Int[Array, "n"]
  wide: Int[Array, "n"]
  rows: Int[Array, "n"]
  columns: Int[Array, "n"]

  @classmethod
  def of(cls, answer: Int[Array, "n 8"]) -> "Origins":
    return cls(*jnp.moveaxis(answer, -1, 0))


# Answered by a vision-language model alone.
OF_IMAGES = (Seen, Origin, Merged)
