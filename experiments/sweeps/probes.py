"""Questions about long contexts, and what share of them is answered."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.data.recall import Recall
from experiments.sweeps.probe import NOTHING, OWN, Grid, Probe
from experiments.sweeps.text_tasks import of_text

__all__ = ["NOTHING", "OWN", "Grid", "Probe", "of_recall", "of_text"]

# Asked one after another about the same text.
QUESTIONS = 4


def of_recall(data: Recall, grid: Grid) -> list[Probe]:
  """Probes of the associative recall that a model was trained on.

  Raises:
    ValueError: the grid has tasks that need a model of text.
  """
  if more := grid.only_text():
    raise ValueError(
      f"grid.{more[0]}: needs a model of text; take subject.name='checkpoint'"
      " or leave it out"
    )
  rng, out = np.random.default_rng((grid.seed, 2)), []

  def add(length, pairs, depth):
    text = data.text(rng, length, pairs, depth)
    which = rng.integers(0, pairs, QUESTIONS)
    if pairs >= QUESTIONS:
      which = rng.permutation(pairs)[:QUESTIONS]
    asked, answer = text.keys[which], text.values[which]
    prompt = [*text.context, *asked] if grid.known else [*text.context]
    if pairs == 1:  # asking the same question again measures nothing new
      answer = np.where(np.arange(QUESTIONS) == 0, answer, NOTHING)
    at = -1.0 if depth is None else depth
    task = "single" if pairs == 1 else "keys"
    out.append(Probe(prompt, asked, answer, length, at, pairs, task=task))

  for where in grid.questions():
    add(*where)
  return out


def recall_of(right: np.ndarray, asked: Sequence[Probe]) -> dict[str, Any]:
  """Shares of right answers: over all, by length and depth, by task.

  "recall" and "recall_map", which has a row for each length and a column for
  each depth, are of single needles; "multi_key_recall" is of several keys.
  Every task has its share as "task_NAME".

  Args:
    right: share of right answers to each probe, `[probes]`.
    asked: the probes.
  """
  length = np.array([probe.length for probe in asked])
  depth = np.array([probe.depth for probe in asked])
  task = np.array([probe.task for probe in asked])
  single, several = task == "single", task == "keys"
  lengths = np.unique(length[single | several])
  depths = np.unique(depth[single])
  share = lambda where: float(right[where].mean()) if where.any() else None
  return {
    "recall": share(single),
    "multi_key_recall": share(several),
    "lengths": lengths.tolist(),
    "depths": depths.tolist(),
    "recall_map": [
      [share(single & (length == n) & (depth == d)) for d in depths]
      for n in lengths
    ],
    "multi_key_by_length": [share(several & (length == n)) for n in lengths],
    **{f"task_{name}": share(task == name) for name in dict.fromkeys(task)},
  }
