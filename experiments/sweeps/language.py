"""Sweeps of language models: answers, perplexity, bytes and decode time."""

import dataclasses
import functools
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np

from experiments import typed
from experiments.sweeps import (
  asking,
  decoding,
  intervals,
  language_report,
  probes,
)
from experiments.sweeps.asking import Answers, Asker, Group, Programs
from experiments.sweeps.count import Told
from experiments.sweeps.decoding import Dense
from experiments.sweeps.dense_prefill import Kept
from experiments.sweeps.language_models import SOURCES, RecallAndText
from experiments.sweeps.programs import speedup
from experiments.sweeps.report import Plot, Table
from experiments.sweeps.results import Results, Row
from experiments.sweeps.subject import Job, OptionsSweep
from tokjax.analysis import heatmaps

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Language(OptionsSweep):
  """Settings of a sweep of language models.

  Attributes:
    subject: models and questions; "trained_pair" or "checkpoint".
    keeps: fractions of the prompt that remain.
    grid: questions about long contexts.
    texts, context, steps: held-out texts, tokens of each that are the prompt,
      and tokens after it.
    batch_size: the most examples of a batch.
    tokens: the most tokens of a batch's prompts, so that batches of longer
      prompts are smaller.
    buckets: lengths that prompts are padded to, ascending; those that are
      longer than all (or all, if there are none) are padded by an eighth at
      most. Each has programs of its own.
    memory: GiB for what dense prefills left; what does not fit is computed once
      for every few recipes.
    rounds: batches whose time is taken, of the longest prompts; the first of a
      length, which compiles, is not, or is run again.
    picture_keep: keep ratio of the heat maps.
  """

  subject: Annotated[Any, typed.OneOf(SOURCES)]
  families: tuple[str, ...] = ("cache", "llm")
  keeps: tuple[float, ...] = (0.5, 0.25, 0.125)
  picture_keep: float = 0.25
  grid: probes.Grid = probes.Grid()
  texts: int = 32
  context: int = 192
  steps: int = 64
  tokens: int = 8192
  buckets: tuple[int, ...] = ()
  memory: float = 8.0

  SUBJECTS = SOURCES
  STEM, PICTURE = "kv_pareto", "recall.png"
  DEPENDS = (
    "subject", "options", "grid", "batch_size", "texts", "context", "steps",
    "tokens", "buckets",
  )  # fmt: skip
  NOTHING = "full"
  TOGETHER: ClassVar[int | None] = 4
  COMPILING: ClassVar[float] = 0.1

  def __post_init__(self):
    super().__post_init__()
    self.at_least_one("texts", "context", "steps", "tokens")
    if self.memory < 0:
      raise ValueError(f"memory={self.memory}: must not be negative")
    if list(self.buckets) != sorted(set(self.buckets)) or 0 in self.buckets:
      raise ValueError(f"buckets={self.buckets}: must be positive, ascending")

  def fingerprint(self) -> dict[str, Any]:
    """See `Sweep.fingerprint`; rows had no intervals, and no tasks, once."""
    return {**super().fingerprint(), "intervals": True, "tasks": True}

  def prepare(self, workdir: pathlib.Path) -> "LanguageSubject":
    """See `Sweep.prepare`."""
    length = self.context + self.steps + 1
    models = self.subject.prepare(workdir, self.grid, self.texts, length)
    return LanguageSubject(self, models)


class LanguageSubject:
  """Language models under the settings of a sweep; a `Subject`.

  Attributes:
    settings, models: of the sweep.
    texts: whose likelihood is measured.
    groups: batches of questions and texts, by model and length of prompts.
  """

  def __init__(self, settings: Language, models: RecallAndText):
    self.settings, self.models = settings, models
    self.origin = models.origin
    self.texts = asking.texts_of(models, settings.context)
    self.groups = asking.groups_of(
      models, models.probes, self.texts, settings.batch_size, settings.tokens,
      settings.buckets,
    )  # fmt: skip
    self._lock = threading.Lock()
    self._found: dict[Any, Answers] = {}

  @functools.cached_property
  def _dense(self) -> dict[Group, Dense]:
    """The recorded prefill of each group."""
    return {
      group: Dense.of(self.models.model(group.model), group.shape)
      for group in self.groups
    }

  @functools.cached_property
  def _prompt_of(self) -> np.ndarray:
    """Number of each question's prompt: those of one are not independent."""
    numbers: dict[tuple[int, ...], int] = {}
    prompts = (tuple(probe.prompt) for probe in self.models.probes)
    return np.array([numbers.setdefault(p, len(numbers)) for p in prompts])

  @functools.cached_property
  def _ask(self) -> Asker:
    return Asker(
      self.models, self.models.probes, self.texts, self.groups, self._dense,
      Kept(int(self.settings.memory * GIB)), self.settings.rounds,
    )  # fmt: skip

  def compile(self, job: Job) -> Programs:
    """See `Subject.compile`."""
    with self._lock:
      dense = self._dense
    built, notes = {}, {}
    for group in self.groups:
      lm, shape = self.models.model(group.model), group.shape
      fitting, note = decoding.fitted(lm, job, shape)
      built[group] = decoding.build(lm, fitting, shape, dense[group])
      if note:
        notes[shape.prompt] = note
    said = (f"{size} tokens: {notes[size]}" for size in sorted(notes))
    return Programs(job, built, "; ".join(said))

  def score(
    self, programs: Sequence[Programs], whole: Programs, told: Told
  ) -> list[Row]:
    """Answers, nats per token, bytes of one text's cache, and times.

    Means over seeds; intervals are those of `intervals.difference` to the full
    cache, question by question and text by text.
    """
    # A budget that prompts do not reach changes nothing: asked once. A sweep
    # that goes on has yet to ask the full cache.
    new = {
      program.identity: program
      for program in (whole, *programs)
      if program.identity not in self._found
    }
    if new:
      answers = self._ask(list(new.values()), whole, told)
      self._found.update(zip(new, answers, strict=True))
    full = self._found[whole.identity]
    return [
      {
        **self._row(self._found[p.identity], full, same=p is whole),
        "fitted": p.fitted,
      }
      for p in programs
    ]

  def _row(self, own: Answers, full: Answers, same: bool = False) -> Row:
    asked = self.models.probes
    task = np.array([probe.task for probe in asked])
    row = {
      **probes.recall_of(own.right.mean(axis=0), asked),
      "tasks": float(own.right.mean()),
      "nats_per_token": float(own.nats.mean()),
      "logical_bytes": float(np.mean(own.logical)),
      "physical_bytes": float(np.mean(own.physical)),
      **self._times(own, same),
    }
    name_of = np.array([text.task for text in self.texts])
    for name in dict.fromkeys(name_of.tolist()):
      row[f"nats_{name}"] = float(own.nats[:, name_of == name].mean())
    points = 100 * (full.right - own.right)
    group = self._prompt_of
    single, keys = task == "single", task == "keys"
    for name, moved, of in (
      ("recall", points[:, single], group[single]),
      ("multi_key_recall", points[:, keys], group[keys]),
      ("tasks", points, group),
      ("nats", own.nats - full.nats, None),
    ):
      if moved.size:
        found = intervals.difference(moved, of)
        row[f"{name}_interval"] = found.half
        row[f"{name}_lost_by_seed"] = found.by_seed
    return row

  def _times(self, own: Answers, same: bool) -> Row:
    """Milliseconds by the best batch; ratios are medians over batches.

    The full cache is compared with itself: 1, whatever the noise.
    """
    prefill, decode = np.array(own.prefill), np.array(own.decode)
    if same:
      prefill, decode = prefill[:, [1, 1]], decode[:, [1, 1]]
    return {
      "decode_ms": 1e3 * float((decode[:, 0] / own.steps).min()),
      "decode_speedup": speedup(decode),
      "prefill_ms": 1e3 * float(prefill[:, 0].min()),
      "prefill_overhead": float(np.median(prefill[:, 0] / prefill[:, 1])) - 1,
    }

  def calls(self, program: Programs) -> dict[str, Callable[[], Any]]:
    """Nothing: the batches that are scored are timed."""
    del program
    return {}

  def speed(self, seconds: Mapping[str, np.ndarray]) -> Row:
    """See `calls`."""
    del seconds
    return {}

  def plot(self, results: Results) -> Plot:
    """See `Subject.plot`."""
    return language_report.plot(results, self._others)

  def table(self, results: Results) -> Table:
    """See `Subject.table`."""
    return language_report.table(results, self._others, self._texts)

  @property
  def _others(self) -> list[str]:
    """Tasks that are neither a needle nor several."""
    tasks = dict.fromkeys(probe.task for probe in self.models.probes)
    return [task for task in tasks if task not in ("single", "keys")]

  @property
  def _texts(self) -> list[str]:
    """Names of the texts."""
    return list(dict.fromkeys(text.task for text in self.texts))

  def picture(
    self, results: Results, methods: Sequence[str], path: pathlib.Path
  ) -> None:
    """Heat maps of recall by length and depth."""
    del methods
    keep, whole = self.settings.picture_keep, results.whole
    if whole["recall"] is None:
      return
    shown = [row for row in results.rows if row["keep"] in (1.0, keep)]
    heatmaps.draw_recall(
      {row["method"]: row["recall_map"] for row in shown},
      whole["lengths"],
      whole["depths"],
      path,
      title=f"Recall of one needle, {keep:g} of the prompt kept",
    )
