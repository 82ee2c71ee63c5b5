"""Reductions of patches that are merged behind an encoder (pixel shuffle).

Before blocks of patches are merged no patch can go without leaving a hole in
its block. Reductions at the output of the last block therefore act on merged
patches; what rules ask of a block of the encoder is answered for each patch and
averaged over those that are merged.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from tokjax import signals
from tokjax.models import vlm_tower as tower
from tokjax.models.reducer import Reducer, Reduces, sequence_of_patches
from tokjax.reduce.stages import Stages, plan_stages
from tokjax.signals import Answers, Question
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens

Grid = tuple[int, int]


def behind(slots: Slots) -> Slots:
  """The part of an encoder's slots that acts on merged patches."""
  own = tuple(r for r in slots.reduce if r.at == "output")
  return Slots(reduce=own, name=slots.name)


def inside(slots: Slots) -> Slots:
  """The other part, which also answers what the first asks."""
  asked = [
    dataclasses.replace(question, layer=0)
    for reduce in behind(slots).reduce
    for question in reduce.asks
    if not isinstance(question, signals.OF_THE_CALL)
  ]
  rest = tuple(r for r in slots.reduce if r.at != "output")
  collect = tuple(dict.fromkeys([*slots.collect, *asked]))
  return dataclasses.replace(slots, reduce=rest, collect=collect)


def stages_of(slots: Slots, grid: Grid, depth: int) -> Stages:
  """The reductions of a grid of merged patches."""
  sequence = sequence_of_patches(grid[0] * grid[1], 0, grid)
  return plan_stages(slots.reduce, sequence, depth, recipe=slots.name)


def mean_of_merged(
  question: Question, value: Array, size: int, order: np.ndarray | None = None
) -> Array:
  """An answer about patches as one about merged patches, of a batch.

  Args:
    question: says which axes of the answer are tokens.
    value: the answer.
    size: patches that are merged.
    order: the tokens that are patches, those that are merged next to each
      other; None: all are, in this order.
  """
  for axis in question.axes:
    # Axes from the front are those of one example.
    axis = axis + 1 if axis >= 0 else axis + value.ndim
    if order is not None:
      value = jnp.take(value, order, axis=axis)
    shape = value.shape
    value = value.reshape(*shape[:axis], -1, size, *shape[axis + 1 :])
    value = value.mean(axis=axis + 1)
  return value


class MergedPatches(Reduces, nn.Module):
  """Reductions behind the last block of an encoder.

  Attributes:
    kinds: of the tokens in front of the patches.
    depth: blocks of the encoder.
    grid: rows and columns of patches.
    merge: patches on a side of a block that becomes one token.
    slots: see `behind`.
  """

  kinds: tuple[Kind, ...]
  depth: int
  grid: Grid
  merge: int
  slots: Slots = Slots()

  def __post_init__(self):
    super().__post_init__()
    what = "an encoder whose patches are merged"
    tower.check_slots(self.slots, what, ("output",), tower.ANSWERS)
    tower.check_kinds(self.slots, {*self.kinds, Kind.PATCH})
    stages = stages_of(self.slots, self.merged_grid, self.depth)
    for stage in (s for block in stages[:-1] for s in block):
      raise ValueError(
        f"{self.slots.described(stage.reduce)} acts behind block {stage.layer}"
        f" of {self.depth} of {what}; it must act behind the last, or within"
        " the projector"
      )

  @property
  def merged_grid(self) -> Grid:
    return self.grid[0] // self.merge, self.grid[1] // self.merge

  def setup(self):
    self.setup_reductions()

  def __call__(
    self,
    tokens: Tokens,
    collected: list[Answers],
    key: PRNGKeyArray | None = None,
  ) -> Tokens:
    """Those of the merged patches that remain.

    Args:
      tokens: merged patches, `[k, m, d]`.
      collected: what each block of the encoder answered about all its tokens.
      key: for recipes that are random.
    """
    stages = stages_of(self.slots, self.merged_grid, self.depth)
    masked = tokens.mask is not None
    reducer = Reducer.create(
      self.slots, stages, len(tokens.x), masked=masked, ragged=masked, key=key
    )
    answers: Any = Answers()
    for i in range(self.depth):
      for question in reducer.asked_of_attention(i):
        value = mean_of_merged(
          question, collected[i][question], self.merge**2, self._order
        )
        answers = answers.add(question, value)
    passage = reducer.start(tokens).replace(plans=((),), answers=answers)
    return self.reduce_at("output", self.depth - 1, passage, reducer).tokens

  @property
  def _order(self) -> np.ndarray:
    """Patches block by block, behind the tokens in front."""
    (rows, columns), merge = self.grid, self.merge
    at = np.arange(rows * columns).reshape(
      rows // merge, merge, columns // merge, merge
    )
    return len(self.kinds) + at.transpose(0, 2, 1, 3).reshape(-1)
