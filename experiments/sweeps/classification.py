"""Sweeps of image classifiers: accuracy, FLOPs and speed of every recipe."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import typed
from experiments.sweeps import intervals, merges
from experiments.sweeps.classifiers import CLASSIFIERS, Classifier
from experiments.sweeps.count import Told
from experiments.sweeps.forward import Program, compile_forward
from experiments.sweeps.programs import speedup
from experiments.sweeps.report import Loss, Plot, Table
from experiments.sweeps.results import Results, Row
from experiments.sweeps.subject import Job, Sweep
from tokjax import recipes
from tokjax.analysis import pareto, plots

# What a method that chooses has to beat.
REFERENCE = "random"


@dataclasses.dataclass(frozen=True)
class Classification(Sweep):
  """Settings of a sweep of an image classifier.

  Attributes:
    subject: the model and its held-out images; "trained" or "pretrained".
    shares: costs the table compares at, as shares of the unreduced model's;
      it is sorted by the first.
    picture_keep, pictures: keep ratio and number of images of `merges.png`.
  """

  subject: Annotated[Any, typed.OneOf(CLASSIFIERS)]
  families: tuple[str, ...] = ("baseline", "vision")
  keeps: tuple[float, ...] = (0.9, 0.7, 0.5, 0.35, 0.2)
  batch_size: int = 64
  shares: tuple[float, ...] = (0.75, 0.65, 0.55)
  pictures: int = 6

  SUBJECTS = CLASSIFIERS
  STEM, PICTURE = "pareto", "merges.png"
  DEPENDS = ("subject", "batch_size")
  NOTHING = "none"

  def __post_init__(self):
    super().__post_init__()
    self.at_least_one("pictures")
    self.fractions("shares", *self.shares)
    if not self.shares:
      raise ValueError("shares=(): give at least one, to sort the table by")

  def prepare(self, workdir: pathlib.Path) -> "ClassificationSubject":
    """See `Sweep.prepare`."""
    return ClassificationSubject(self, self.subject.prepare(workdir))


@dataclasses.dataclass(frozen=True)
class ClassificationSubject:
  """A classifier under the settings of a sweep; a `Subject`."""

  settings: Classification
  classifier: Classifier

  @property
  def origin(self) -> str:
    return self.classifier.origin

  @functools.cached_property
  def images(self) -> jax.Array:
    """The first batch of held-out images, which is timed."""
    return jax.device_put(self.classifier.images(self.settings.batch_size))

  def compile(self, job: Job) -> Program:
    """See `Subject.compile`."""
    inputs = self.classifier.params, self.images
    log_p = lambda logits: jax.nn.log_softmax(logits.astype(jnp.float32))
    return compile_forward(self.classifier, job, *inputs, of=log_p)

  def score(
    self, programs: Sequence[Program], whole: Program, told: Told
  ) -> list[Row]:
    """Accuracy, and drift from the unreduced model's answers.

    Means over seeds. The data is read once for all programs; random recipes
    draw the same keys in every run. Drift is the mean Kullback-Leibler
    divergence in nats; FLOPs are those of one image.
    """
    size = self.settings.batch_size
    rounds = self.classifier.rounds(size)
    right, drift = [], []
    for i, batch in enumerate(self.classifier.batches(size)):
      real = batch["weight"] > 0
      inputs = jnp.asarray(batch["image"]), jax.random.key(i)
      hits, moved = self._answers(programs, whole, inputs, batch["label"])
      right.append(hits[..., real])
      drift.append(moved[..., real])
      told(i + 1, rounds)
    hits, moved = np.concatenate(right, -1), np.concatenate(drift, -1)
    return [
      {
        "tokens_per_block": list(program.tokens),
        "accuracy": float(own.mean()),
        **intervals.lost(hits[-1], own),
        "drift": float(drifted.mean()),
        "gflops": program.cost.flops / size / 1e9,
        "gflops_exact": program.cost.exact,
      }
      for program, own, drifted in zip(
        programs, hits[:-1], moved[:-1], strict=True
      )
    ]

  def _answers(
    self, programs: Sequence[Program], whole: Program, inputs, label
  ) -> tuple[np.ndarray, np.ndarray]:
    """Whether answers are right, and their divergence from the whole model's.

    Both `[programs + 1, seeds, b]`; the whole model comes last.
    """
    hits, moved = [], []
    for params in self.classifier.weights:
      each = [
        np.asarray(program.run(params, *inputs))
        for program in (*programs, whole)
      ]
      own = each[-1]
      hits.append([found.argmax(-1) == label for found in each])
      moved.append([(np.exp(own) * (own - f)).sum(axis=-1) for f in each])
    return np.stack(hits, axis=1), np.stack(moved, axis=1)

  def calls(self, program: Program) -> dict[str, Callable[[], Any]]:
    """See `Subject.calls`."""
    return program.calls(self.classifier.params, self.images)

  def speed(self, seconds: Mapping[str, np.ndarray]) -> Row:
    """Images per second by the best round and the median one; speed-up."""
    own, size = seconds["forward"][:, 0], self.settings.batch_size
    return {
      "images_per_second": float(size / own.min()),
      "images_per_second_median": float(size / np.median(own)),
      "speedup": speedup(seconds["forward"]),
    }

  def plot(self, results: Results) -> Plot:
    """Accuracy and drift against FLOPs saved and time saved."""
    whole = results.whole
    accuracy = f"points of accuracy lost (of {100 * whole['accuracy']:.1f} %)"
    drift = "answers moved by (KL divergence, nats)"
    count = len({row["method"] for row in results.reduced})
    return Plot(
      title=f"{count} ways to reduce tokens, none trained",
      savings={
        "times fewer FLOPs": lambda row: whole["gflops"] / row["gflops"],
        "times faster, measured": lambda row: row["speedup"],
      },
      losses=[
        Loss(
          plots.Axis(accuracy, 1.0),
          lambda row: row["lost"],
          lambda row: row["lost_interval"],
        ),
        Loss(plots.Axis(drift, 1e-3), lambda row: row["drift"]),
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
        "-" if x != x else f"{x:.1f} ± {h:.1f}"
        for x, h in zip(ranked.loss, half, strict=True)
      ]
      drift = "-" if ranked.drift != ranked.drift else f"{ranked.drift:.0e}"
      name = f"{ranked.method} *" if ranked.on_front else ranked.method
      cells = [_cell(results, ranked.method, keep) for keep in keeps]
      rows.append([name, *losses, drift, *cells])
    return Table(
      ["method", *(f"at {share:.0%}" for share in shares)]
      + [f"drift at {shares[0]:.0%}", *(f"keep {keep:g}" for keep in keeps)],
      rows,
      title=f"Points of accuracy lost at equal cost; unreduced:"
      f" {whole['accuracy']:.2%}, {whole['gflops']:.3g} GFLOPs an image,"
      f" {whole['images_per_second']:.0f} images/s",
      caption="cost: FLOPs of the compiled program, selection included, as a"
      " share of the unreduced model's; ±: 95 % interval over images"
      f"{' and seeds' if self._seeds > 1 else ''}; drift: KL divergence of the"
      " answers in nats, decides ties; keep: accuracy and measured speed-up; *"
      f" on the Pareto front; - not reached{self._verdict(results)}",
    )

  @property
  def _seeds(self) -> int:
    return len(self.classifier.weights)

  def _verdict(self, results: Results) -> str:
    """What the intervals and the seeds say about the order of methods."""
    share = self.settings.shares[:1]
    by_seed = [
      at_shares(results, lambda row, i=i: row["lost_by_seed"][i], share)
      for i in range(self._seeds)
    ]
    reached = {
      method: np.concatenate([losses[method] for losses in by_seed])
      for method, loss in by_seed[0].items()
      if np.isfinite(loss).all()
    }
    said = ""
    tau = intervals.agreement(reached)
    if np.isfinite(tau):
      said += f"; order of methods between seeds: Kendall's tau {tau:.2f}"
    if REFERENCE in reached:
      measure = lambda row: row["lost_interval_images"]
      halves = at_shares(results, measure, share)
      unclear = intervals.unclear(reached, halves, REFERENCE)
      if unclear:
        said += (
          f"; not clearly better than {REFERENCE} at {share[0]:.0%}:"
          f" {', '.join(unclear)}"
        )
    return said

  def picture(
    self, results: Results, methods: Sequence[str], path: pathlib.Path
  ) -> None:
    """Merge maps of all methods on a few images."""
    del results
    settings = self.settings
    jobs = [settings.job(method, settings.picture_keep) for method in methods]
    merges.draw(
      self.classifier, jobs, settings.pictures, settings.threads, path
    )



def share_of(results: Results) -> Callable[[Row], float]:
  """What a row costs, as a share of the unreduced model."""
  whole = results.whole["gflops"]
  return lambda row: row["gflops"] / whole


def at_shares(
  results: Results, measure: Callable[[Row], float], shares: Sequence[float]
) -> dict[str, np.ndarray]:
  """A measure of every method at shares of the unreduced model's cost, `[c]`.

  Linear between rows; 0 for the unreduced model; NaN beyond the last row.
  """
  curves = results.curves(share_of(results), measure)
  return {
    method: pareto.at_cost([*curve, (1.0, 0.0)], shares)
    for method, curve in curves.items()
  }


def ranking(results: Results, shares: Sequence[float]) -> list[pareto.Ranked]:
  """Methods by accuracy lost at equal cost, see `pareto.rank`."""
  share = share_of(results)
  return pareto.rank(
    results.curves(share, lambda row: row["lost"]),
    results.curves(share, lambda row: row["drift"]),
    shares,
  )


def _cell(results: Results, method: str, keep: float) -> str:
  """Accuracy and measured speed-up of one row."""
  for row in results.rows:
    if (row["method"], row["keep"]) == (method, keep):
      return f"{100 * row['accuracy']:.1f} {row['speedup']:.2f}x"
  return "-"
