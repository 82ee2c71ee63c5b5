"""Baselines that need no idea, and that papers should beat."""

import dataclasses

import jax

from tokjax import budgets, matching, scores, selection
from tokjax.budgets import Budget
from tokjax.plan import Assignment, Plan
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_best
from tokjax.reduce.site import Site
from tokjax.signals import Grid, Random, asks
from tokjax.slots import Slots

STAGES = budgets.Ratio(0.7)


@recipe("none", family="baseline", paper="-")
def none() -> Slots:
  """The model itself."""
  return Slots()


@asks(Random())
def drop_random(site: Site) -> Plan:
  """Keeps the largest of independent random numbers."""
  return keep_best(site, scores.random(site.key, site.num_free))


@recipe(
  "random",
  family="baseline",
  paper="-",
  evidence="a definition; keep counts of TokenReduction's protocol",
)
def random(budget: Budget = STAGES) -> Slots:
  """Keeps patches drawn without replacement, a new draw for every example."""
  return Slots(Reduce(drop_random, budget, at="mlp"))


def drop_by_stride(site: Site) -> Plan:
  """Keeps tokens at equal distances."""
  index, valid = selection.stride(
    site.num_free, site.keep, mask=site.mask, count=site.due
  )
  return Assignment.select(index, site.num_free, valid)


@recipe(
  "stride",
  family="baseline",
  paper="-",
  evidence="Soldelli/residualvit:src/open_clip/transformer.py (f07a70c,"
  " uniform)",
  deviations="indices are exact; the official floating-point steps end one"
  " lower or higher for 1.4 % of all lengths and counts below 200",
)
def stride(budget: Budget = budgets.Once(0.5)) -> Slots:
  """Keeps evenly spaced patches, in row-major order."""
  return Slots(Reduce(drop_by_stride, budget))


def drop_off_centre(site: Site) -> Plan:
  """Keeps the tokens nearest to the middle."""
  return keep_best(site, scores.centrality(site.position, mask=site.mask))


@recipe(
  "center",
  family="baseline",
  paper="-",
  evidence="Soldelli/residualvit:src/open_clip/transformer.py (f07a70c,"
  " center)",
  deviations="of patches at the same distance those of lower index stay; the"
  " official sort leaves it open",
)
def center(budget: Budget = budgets.Once(0.5)) -> Slots:
  """Keeps the patches nearest to the centre of what is left of the image."""
  return Slots(Reduce(drop_off_centre, budget))


@asks(Grid())
def average_cells(site: Site) -> Plan:
  """Averages the tokens within each cell of a smaller grid."""
  return matching.grid_pool(site.grid, matching.cells_of(site.grid, site.keep))


@recipe("avgpool", family="baseline", paper="-")
def avgpool(budget: Budget = budgets.Square(0.5)) -> Slots:
  """Average pooling of the patch embeddings to a smaller grid."""
  return Slots(Reduce(average_cells, budget))


@dataclasses.dataclass(frozen=True)
class Downsample:
  """A program: shrinks the image, so that fewer patches arise.

  Attributes:
    keep_area: fraction of the patches that remain, rounded to whole patches a
      side.
  """

  keep_area: float

  def __post_init__(self):
    budgets.check_keep(self.keep_area, "keep_area")

  def __call__(self, forward, images, patch: int):
    sides = [
      max(1, round(s // patch * self.keep_area**0.5)) * patch
      for s in images.shape[1:3]
    ]
    shape = (images.shape[0], *sides, images.shape[3])
    return forward(jax.image.resize(images, shape, "linear", antialias=True))

  def with_keep(self, keep: float) -> "Downsample":
    return Downsample(keep)


@recipe("downsample", family="baseline", paper="-")
def downsample(keep_area: float = 0.5) -> Slots:
  """A smaller input image; position tables are interpolated.

  Args:
    keep_area: fraction of the patches that remain.
  """
  return Slots(program=Downsample(keep_area))
