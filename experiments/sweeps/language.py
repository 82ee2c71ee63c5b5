"""Sweeps of language models: recall, perplexity, bytes and decode time."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from experiments import typed
from experiments.sweeps import decoding, intervals, probes
from experiments.sweeps.decoding import Shape
from experiments.sweeps.language_models import SOURCES, RecallAndText
from experiments.sweeps.programs import speedup
from experiments.sweeps.report import Loss, Plot, Table
from experiments.sweeps.results import Results, Row
from experiments.sweeps.subject import Job, Sweep, Unfit, find
from tokjax.analysis import heatmaps, plots


@dataclasses.dataclass(frozen=True)
class Language(Sweep):
  """Settings of a sweep of language models.

  Attributes:
    subject: models and questions; "trained_pair" or "checkpoint".
    keeps: fractions of the prompt that remain.
    options: of recipes, by name, where their own defaults are made for longer
      contexts or deeper models than the subject's.
    grid: questions about long contexts.
    texts, context, steps: held-out texts, tokens of each that are the prompt,
      and tokens after it.
    picture_keep: keep ratio of the heat maps.
  """

  subject: Annotated[Any, typed.OneOf(SOURCES)]
  families: tuple[str, ...] = ("cache", "llm")
  keeps: tuple[float, ...] = (0.5, 0.25, 0.125)
  picture_keep: float = 0.25
  options: dict[str, Any] = ()
  grid: probes.Grid = probes.Grid()
  texts: int = 32
  context: int = 192
  steps: int = 64

  SUBJECTS = SOURCES
  STEM, PICTURE = "kv_pareto", "recall.png"
  DEPENDS = (
    "subject", "options", "grid", "batch_size", "texts", "context", "steps",
  )  # fmt: skip
  NOTHING = "full"

  def __post_init__(self):
    super().__post_init__()
    self.at_least_one("context", "steps")
    if self.texts < self.batch_size or self.texts % self.batch_size:
      raise ValueError(
        f"texts={self.texts}: must be a multiple of"
        f" batch_size={self.batch_size}"
      )

  def fingerprint(self) -> dict[str, Any]:
    """See `Sweep.fingerprint`; rows had no intervals once."""
    return {**super().fingerprint(), "intervals": True}

  def methods(self) -> tuple[str, ...]:
    """See `Sweep.methods`.

    Raises:
      ConfigError: no such recipe or family, or `options` that a recipe does
        not have.
    """
    for name, options in dict(self.options).items():
      known = find(name).options
      if unknown := [option for option in options if option not in known]:
        raise typed.ConfigError(
          f"options[{name!r}]: {unknown[0]!r} must be one of {known}"
        )
    return super().methods()

  def job(self, method: str, keep: float) -> Job:
    """A recipe with its options."""
    options = dict(dict(self.options).get(method, {}))
    return Job(method, keep, tuple(sorted(options.items())))

  def prepare(self, workdir: pathlib.Path) -> "LanguageSubject":
    """See `Sweep.prepare`."""
    length = self.context + self.steps + 1
    models = self.subject.prepare(workdir, self.grid, self.texts, length)
    return LanguageSubject(self, models)


@dataclasses.dataclass(frozen=True)
class Programs:
  """A recipe on both models, compiled: for questions and for text."""

  job: Job
  recall: decoding.Program
  text: decoding.Program


class Answers(NamedTuple):
  """What models answer with a recipe.

  Attributes:
    right: share of each question's answers that are right, `[seeds, probes]`.
    nats: per token of each text, `[seeds, texts]`.
  """

  right: np.ndarray
  nats: np.ndarray


@dataclasses.dataclass(frozen=True)
class LanguageSubject:
  """Language models under the settings of a sweep; a `Subject`."""

  settings: Language
  models: RecallAndText

  @property
  def origin(self) -> str:
    return self.models.origin

  @functools.cached_property
  def batch(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The timed batch of text: prompts, lengths, tokens fed and expected."""
    n, size = self.settings.context, self.settings.batch_size
    part = self.models.windows[:size].astype(np.int32)
    length = np.full(size, n, np.int32)
    return part[:, :n], length, part[:, n:-1], part[:, n + 1 :]

  def compile(self, job: Job) -> Programs:
    """See `Subject.compile`."""
    settings, asked = self.settings, self.models.probes
    longest = max(len(probe.prompt) for probe in asked)
    ask = Shape(settings.batch_size, longest, len(asked[0].asked))
    read = Shape(settings.batch_size, settings.context, settings.steps)
    try:
      return Programs(
        job,
        decoding.compile_one(self.models.recall, job, ask),
        decoding.compile_one(self.models.text, job, read),
      )
    except Unfit:
      raise
    except ValueError as error:
      raise Unfit(job, str(error)) from error

  def score(self, programs: Sequence[Programs], whole: Programs) -> list[Row]:
    """Recall, nats per token, and the bytes of one text's cache.

    Means over seeds; intervals are those of `intervals.difference` to the full
    cache, question by question and text by text.
    """
    full = self._answers(whole)
    return [
      self._score(p, full if p is whole else self._answers(p), full)
      for p in programs
    ]

  def _score(self, program: Programs, own: Answers, full: Answers) -> Row:
    text, size = program.text, self.settings.batch_size
    tokens, length, _, _ = self.batch
    logical = np.asarray(text.logical(text.start(tokens, length)))
    single = np.array([probe.depth >= 0 for probe in self.models.probes])
    row = {
      **probes.recall_of(own.right.mean(axis=0), self.models.probes),
      "nats_per_token": float(own.nats.mean()),
      "logical_bytes": float(logical.mean()),
      "physical_bytes": text.physical / size,
    }
    for name, moved in (
      ("recall", 100 * (full.right - own.right)[:, single]),
      ("multi_key_recall", 100 * (full.right - own.right)[:, ~single]),
      ("nats", own.nats - full.nats),
    ):
      if moved.size:
        found = intervals.difference(moved)
        row[f"{name}_interval"] = found.half
        row[f"{name}_lost_by_seed"] = found.by_seed
    return row

  def _answers(self, program: Programs) -> Answers:
    """What the models answer with a recipe, seed by seed."""
    right, nats = [], []
    for recall, text in self.models.weights:
      asked = dataclasses.replace(program.recall, params=recall)
      right.append(decoding.ask(asked, self.models.probes))
      reads = dataclasses.replace(program.text, params=text)
      nats.append(decoding.read(reads, self.models.windows))
    return Answers(np.stack(right), np.stack(nats))

  def calls(self, program: Programs) -> dict[str, Callable[[], Any]]:
    """Prefill, and the decode steps after it."""
    text, (tokens, length, fed, expected) = program.text, self.batch
    leaves = jax.block_until_ready(text.start(tokens, length))
    return {
      "decode": lambda: text.steps(leaves, fed, expected),
      "prefill": lambda: text.start(tokens, length),
    }

  def speed(self, seconds: Mapping[str, np.ndarray]) -> Row:
    """Milliseconds by the best round; ratios are medians over rounds."""
    decode, prefill = seconds["decode"], seconds["prefill"]
    own, whole = prefill.T
    return {
      "decode_ms": 1e3 * float(decode[:, 0].min()) / self.settings.steps,
      "decode_speedup": speedup(decode),
      "prefill_ms": 1e3 * float(own.min()),
      "prefill_overhead": float(np.median(own / whole)) - 1,
    }

  def plot(self, results: Results) -> Plot:
    """Recall and perplexity against bytes saved and time saved."""
    whole = results.whole
    points = lambda name: lambda row: 100 * (whole[name] - row[name])
    half = lambda name: lambda row: row[f"{name}_interval"]
    worse = lambda row: row["nats_per_token"] - whole["nats_per_token"]
    used = lambda row: 1 / _share("logical_bytes", row, whole)
    allocated = lambda row: 1 / _share("physical_bytes", row, whole)
    one = plots.Axis("points of recall lost, one needle", 2.0)
    several = plots.Axis("points of recall lost, several", 2.0)
    nats = plots.Axis("nats per token more, held-out text", 0.05)
    return Plot(
      title="What caches of fewer bytes lose",
      savings={
        "times fewer bytes that count": used,
        "times fewer bytes allocated": allocated,
        "times faster decode steps, measured": lambda r: r["decode_speedup"],
      },
      losses=[
        Loss(one, points("recall"), half("recall")),
        Loss(several, points("multi_key_recall"), half("multi_key_recall")),
        Loss(nats, worse, half("nats")),
      ],
      reference="random_kv",
    )

  def table(self, results: Results) -> Table:
    """A line for each row, by keep and recall."""
    whole = results.whole
    rows = sorted(results.rows, key=lambda r: (-r["keep"], -r["recall"]))
    return Table(
      ("method", "keep", "recall", "first", "middle", "last", "several")
      + ("perplexity", "used", "allocated", "decode", "prefill"),
      [_cells(row, whole) for row in rows],
      title=f"Full cache: recall {whole['recall']:.1%},"
      f" several {whole['multi_key_recall']:.1%}, perplexity"
      f" {math.exp(whole['nats_per_token']):.3f},"
      f" {whole['physical_bytes'] / 1024:.0f} KiB a text,"
      f" {whole['decode_ms']:.2f} ms a step",
      caption="±: 95 % interval of what is lost against the full cache; first,"
      " middle, last: recall by depth, over all lengths; used, allocated: bytes"
      " as a share of the full cache's; decode, prefill: measured next to it",
    )

  def picture(
    self, results: Results, methods: Sequence[str], path: pathlib.Path
  ) -> None:
    """Heat maps of recall by length and depth."""
    del methods
    keep, whole = self.settings.picture_keep, results.whole
    shown = [row for row in results.rows if row["keep"] in (1.0, keep)]
    heatmaps.draw_recall(
      {row["method"]: row["recall_map"] for row in shown},
      whole["lengths"],
      whole["depths"],
      path,
      title=f"Recall of one needle, {keep:g} of the prompt kept",
    )


def _share(name: str, row: Row, whole: Row) -> float:
  """Bytes as a share of the full cache's."""
  return row[name] / whole[name]


def _cells(row: Row, whole: Row) -> list[str]:
  columns = list(zip(*row["recall_map"], strict=True))
  by_depth = [sum(column) / len(column) for column in columns]
  middle = by_depth[len(by_depth) // 2]
  return [
    row["method"],
    f"{row['keep']:g}",
    _recall(row, "recall"),
    *(f"{100 * x:.1f}" for x in (by_depth[0], middle, by_depth[-1])),
    _recall(row, "multi_key_recall"),
    f"{math.exp(row['nats_per_token']):.3f}",
    f"{_share('logical_bytes', row, whole):.1%}",
    f"{_share('physical_bytes', row, whole):.1%}",
    f"{row['decode_speedup']:.2f}x",
    f"{row['prefill_overhead']:+.0%}",
  ]


def _recall(row: Row, name: str) -> str:
  """Percent, with the interval of what is lost."""
  return f"{100 * row[name]:.1f} ±{row[f'{name}_interval']:.1f}"
