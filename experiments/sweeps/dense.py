"""Sweeps of models that map images: how far reduction moves the map."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import typed
from experiments.sweeps import dense_maps, intervals
from experiments.sweeps.classification import at_shares, ranking
from experiments.sweeps.count import Told
from experiments.sweeps.dense_models import DENSE_MODELS, DenseModel
from experiments.sweeps.forward import Program, compile_forward
from experiments.sweeps.programs import speedup
from experiments.sweeps.report import Loss, Plot, Table
from experiments.sweeps.results import Results, Row
from experiments.sweeps.subject import Job, OptionsSweep, find
from tokjax import recipes
from tokjax.analysis import plots

# What a method that chooses has to beat.
REFERENCE = "random"


@dataclasses.dataclass(frozen=True)
class Dense(OptionsSweep):
  """Settings of a sweep of a dense model; every recipe restores the grid.

  Attributes:
    subject: the model and its photographs; "dense".
    shares: costs the table compares at, as shares of the unreduced model's;
      it is sorted by the first.
    pictures: number of images of `maps.png`.
  """

  subject: Annotated[Any, typed.OneOf(DENSE_MODELS)]
  families: tuple[str, ...] = ("baseline", "vision")
  keeps: tuple[float, ...] = (0.75, 0.5, 0.25)
  batch_size: int = 6
  rounds: int = 3
  shares: tuple[float, ...] = (0.85, 0.75, 0.65)
  pictures: int = 3

  SUBJECTS = DENSE_MODELS
  STEM, PICTURE = "dense", "maps.png"
  DEPENDS = ("subject", "batch_size", "options")
  NOTHING = "none"

  def __post_init__(self):
    super().__post_init__()
    self.at_least_one("pictures")
    self.fractions("shares", *self.shares)
    if not self.shares:
      raise ValueError("shares=(): give at least one, to sort the table by")

  def options_of(self, method: str) -> dict[str, Any]:
    """The recipe's options and `restore`."""
    given = super().options_of(method)
    if "restore" in find(method).options:
      given["restore"] = True
    return given

  def prepare(self, workdir: pathlib.Path) -> "DenseSubject":
    """See `Sweep.prepare`."""
    return DenseSubject(self, self.subject.prepare(workdir))


@dataclasses.dataclass(frozen=True)
class DenseSubject:
  """A dense model under the settings of a sweep; a `Subject`."""

  settings: Dense
  model: DenseModel
  # Maps of the first batch by job, for the picture.
  seen: dict[Job, np.ndarray] = dataclasses.field(default_factory=dict)

  @property
  def origin(self) -> str:
    return self.model.origin

  @functools.cached_property
  def first(self) -> jax.Array:
    """The first batch of images, which is timed."""
    batch, _ = next(self.model.batches(self.settings.batch_size))
    return jax.device_put(batch)

  def compile(self, job: Job) -> Program:
    """See `Subject.compile`."""
    return compile_forward(self.model, job, self.model.params, self.first)

  def score(
    self, programs: Sequence[Program], whole: Program, told: Told
  ) -> list[Row]:
    """Agreement with the unreduced model's map, image by image.

    Means over images: Pearson's correlation over pixels, and the absolute
    difference. "lost" is 100 (1 - correlation); "drift" is the difference.
    Random recipes draw anew for every image, the same in every run.
    """
    size = self.settings.batch_size
    found = []
    for i, (batch, real) in enumerate(self.model.batches(size)):
      inputs = (self.model.params, jnp.asarray(batch), jax.random.key(i))
      each = [np.asarray(p.run(*inputs))[:real] for p in (*programs, whole)]
      if not i:
        made = zip((*programs, whole), each, strict=True)
        self.seen.update({program.job: maps for program, maps in made})
      found.append([agreement(maps, each[-1]) for maps in each[:-1]])
      told(i + 1, -(-len(self.model.images) // size))
    rows = []
    for program, (same, apart) in zip(
      programs, np.concatenate(found, axis=-1), strict=True
    ):
      lost = intervals.difference(100 * (1 - same[None]))
      moved = intervals.difference(apart[None])
      rows.append(
        {
          "tokens_per_block": list(program.tokens),
          "correlation": float(same.mean()),
          "correlation_median": float(np.median(same)),
          "correlation_lowest": float(same.min()),
          "lost": lost.mean,
          "lost_interval": lost.half,
          "drift": moved.mean,
          "drift_interval": moved.half,
          "gflops": program.cost.flops / size / 1e9,
          "gflops_exact": program.cost.exact,
        }
      )
    return rows

  def calls(self, program: Program) -> dict[str, Callable[[], Any]]:
    """See `Subject.calls`."""
    return program.calls(self.model.params, self.first)

  def speed(self, seconds: Mapping[str, np.ndarray]) -> Row:
    """Images per second by the best round; speed-up."""
    best = seconds["forward"][:, 0].min()
    return {
      "images_per_second": float(self.settings.batch_size / best),
      "speedup": speedup(seconds["forward"]),
    }

  def plot(self, results: Results) -> Plot:
    """Both losses against FLOPs saved and time saved."""
    whole = results.whole
    count = len({row["method"] for row in results.reduced})
    return Plot(
      title=f"{count} ways to reduce tokens under a dense head, none trained",
      savings={
        "times fewer FLOPs": lambda row: whole["gflops"] / row["gflops"],
        "times faster, measured": lambda row: row["speedup"],
      },
      losses=[
        Loss(
          plots.Axis("100 (1 - correlation of the maps)", 1.0),
          lambda row: row["lost"],
          lambda row: row["lost_interval"],
        ),
        Loss(
          plots.Axis("mean absolute difference of the maps", 0.01),
          lambda row: row["drift"],
          lambda row: row["drift_interval"],
        ),
      ],
      reference=REFERENCE,
      baselines=recipes.names("baseline"),
    )

  def table(self, results: Results) -> Table:
    """A line for each method, the smallest loss at the top."""
    shares, whole = self.settings.shares, results.whole
    keeps = sorted({row["keep"] for row in results.rows} - {1.0}, reverse=True)
    halves = at_shares(results, lambda row: row["lost_interval"], shares)
    rows = []
    for ranked in ranking(results, shares):
      half = halves[ranked.method]
      losses = [
        "-" if x != x else f"{1 - x / 100:.3f} ± {h / 100:.3f}"
        for x, h in zip(ranked.loss, half, strict=True)
      ]
      name = f"{ranked.method} *" if ranked.on_front else ranked.method
      cells = [_cell(results, ranked.method, keep) for keep in keeps]
      rows.append([name, *losses, *cells])
    return Table(
      ["method", *(f"at {share:.0%}" for share in shares)]
      + [f"keep {keep:g}" for keep in keeps],
      rows,
      title=f"Correlation with the unreduced map at equal cost; unreduced:"
      f" {whole['gflops']:.3g} GFLOPs and {1 / whole['images_per_second']:.2g}"
      " s an image",
      caption="cost: FLOPs of the compiled program, selection and head"
      " included, as a share of the unreduced model's; ±: 95 % interval over"
      " the images, which overlap; keep: correlation, mean absolute difference"
      " of the maps, and measured speed-up; * on the Pareto front; - not"
      f" reached{self._verdict(results)}",
    )

  def _verdict(self, results: Results) -> str:
    """Which methods do not beat the reference, by the intervals."""
    share = self.settings.shares[:1]
    found = at_shares(results, lambda row: row["lost"], share)
    reached = {m: loss for m, loss in found.items() if np.isfinite(loss).all()}
    if REFERENCE not in reached:
      return ""
    halves = at_shares(results, lambda row: row["lost_interval"], share)
    unclear = intervals.unclear(reached, halves, REFERENCE)
    if not unclear:
      return ""
    return (
      f"; not clearly better than {REFERENCE} at {share[0]:.0%}:"
      f" {', '.join(unclear)}"
    )

  def picture(
    self, results: Results, methods: Sequence[str], path: pathlib.Path
  ) -> None:
    """The maps of all methods on a few images."""
    settings = self.settings
    jobs = [settings.job(method, settings.picture_keep) for method in methods]
    found = {
      (row["method"], row["keep"]): f"{row['correlation']:.2f}"
      for row in results.rows
    }
    notes = {job.method: found.get((job.method, job.keep), "") for job in jobs}
    dense_maps.draw(
      self.model, jobs, settings.pictures, settings.threads, path, notes,
      self.seen,
    )  # fmt: skip


def agreement(
  maps: np.ndarray, whole: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Correlation and mean absolute difference of maps `[b, ...]`, both `[b]`.

  A map without any contrast correlates with nothing: 0.
  """
  a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (maps, whole))
  apart = np.abs(a - b).mean(axis=1)
  a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
  scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
  same = (a * b).sum(axis=1) / np.where(scale > 0, scale, 1.0)
  return np.where(scale > 0, same, 0.0), apart


def _cell(results: Results, method: str, keep: float) -> str:
  """Correlation, difference and measured speed-up of one row."""
  for row in results.rows:
    if (row["method"], row["keep"]) == (method, keep):
      return (
        f"{row['correlation']:.3f} {row['drift']:.3f} {row['speedup']:.2f}x"
      )
  return "-"
