"""The stages of the report, in order of value."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Stage:
  """Rows that one worker measures.

  Attributes:
    letter: of the group that `--stages` names.
    name: unique.
    about: what it measures, for people.
    jobs: "module:function" from `Here` to the list of jobs.
    options: of that function.
    weight: share of the time, as a ratio to the others'.
    row_seconds: how long one row may take.
    timed: whether times count. Stages that only check run at the same time as
      their neighbours.
    best: how many rows are shown, the fastest first; None: all, as they came.
  """

  letter: str
  name: str
  about: str
  jobs: str
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  weight: float = 1.0
  row_seconds: float = 60.0
  timed: bool = True
  best: int | None = None


_HERE = "scripts.report"


def _checked(head_size: int) -> Stage:
  return Stage(
    "a", f"attention {head_size}",
    "block-sparse attention against float64, forward and backward, all kinds of"
    f" masks, head size {head_size}",
    f"{_HERE}.check_attention:jobs", {"head_size": head_size}, weight=20,
    timed=False,
  )  # fmt: skip


STAGES = (
  _checked(128),
  _checked(64),
  _checked(256),
  Stage(
    "a", "other operations",
    "attention mass, decode and linear attention against float64",
    f"{_HERE}.check_operations:jobs", weight=20, timed=False,
  ),
  Stage(
    "b", "machine", "matrix products and memory of this machine",
    f"{_HERE}.machine:jobs", weight=5,
  ),
  Stage(
    "c", "sparse",
    "block-sparse attention of head size 128 at 10 % density and at 1, next"
    " to dense attention; planning",
    f"{_HERE}.sparse:lengths", weight=20,
  ),
  Stage(
    "c", "sparse shapes",
    "the same with other head sizes, grouped heads and small blocks",
    f"{_HERE}.sparse:shapes", weight=12,
  ),
  Stage(
    "d", "operations",
    "decode, attention mass and linear attention next to their XLA forms",
    f"{_HERE}.operations:jobs", weight=12,
  ),
  Stage(
    "e", "models",
    "ViT-B/16 with ToMe next to dense; a Llama-shaped layer that decodes",
    f"{_HERE}.models:jobs", weight=16, row_seconds=120,
  ),
  Stage(
    "c", "flex", "FlexAttention over the same lists, where PyTorch has the GPU",
    f"{_HERE}.rival:jobs", weight=10, row_seconds=120,
  ),
  Stage(
    "f", "tiles", "the kernels with other tiles and stages than today's",
    f"{_HERE}.tiles:jobs", weight=16, best=20,
  ),
)  # fmt: skip
LETTERS = tuple(dict.fromkeys(stage.letter for stage in STAGES))


def chosen(letters: str) -> tuple[Stage, ...]:
  """The stages of a list such as "a,c".

  Raises:
    ValueError: for another letter.
  """
  wanted = [letter.strip() for letter in letters.split(",")]
  for letter in wanted:
    if letter not in LETTERS:
      raise ValueError(
        f"--stages {letters}: {letter!r} is no stage; allowed: "
        f"{', '.join(LETTERS)}"
      )
  return tuple(stage for stage in STAGES if stage.letter in wanted)


def groups(stages: tuple[Stage, ...]) -> list[tuple[Stage, ...]]:
  """Stages in order; neighbours that only check stand together."""
  found: list[list[Stage]] = []
  for stage in stages:
    if found and not (stage.timed or found[-1][-1].timed):
      found[-1].append(stage)
    else:
      found.append([stage])
  return [tuple(group) for group in found]
