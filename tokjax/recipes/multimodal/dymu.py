"""DyMU: as many tokens as an image needs, seen at all of their places."""

from typing import Any

import jax.numpy as jnp

from tokjax import learned, losses, matching, selection
from tokjax.binding import bind
from tokjax.budgets import Budget, Encoded, Even, check_keep
from tokjax.plan import Assignment, Plan
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.recipes.registry import recipe
from tokjax.recipes.vision.merging import (
  alternating,
  by_index_after_class,
  cosines,
)
from tokjax.reduce.back import Back
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.signals import Keys, Merged, asks
from tokjax.slots import Slots


@asks(Keys())
def merge_similar(site: Site, *, thresholds: tuple[float, ...]) -> Plan:
  """Sources whose best edge is above the block's threshold merge.

  So do the best of the others, where more than the budget would be left.
  """
  n, due, mask = site.num_free, site.due, site.mask
  above = site.learned
  if above is None and thresholds:
    if len(thresholds) != site.depth:
      raise ValueError(
        f"thresholds={thresholds}: must be {site.depth} numbers, one for each"
        " block of the encoder"
      )
    above = thresholds[site.layer]
  if due is None and mask is not None:
    due = jnp.int32(site.keep)
  sides = alternating(site)
  plan = matching.bipartite(
    cosines(site.keys.mean(axis=0), sides), sides, n, site.remove, mask=mask,
    count=due, unmerged=by_index_after_class(site), above=above,
  )  # fmt: skip
  return plan.weighted(site.size)


@asks(Merged())
def copies(site: Site) -> Plan:
  """The visual tokens that the encoder made one are one, the first of them."""
  n, mask = site.num_free, site.mask
  mask = jnp.ones((n,), bool) if mask is None else mask
  place = jnp.arange(n)
  group = selection.groups(site[Merged()], mask=mask)
  first = jnp.full((n + 1,), n).at[group].min(place)[group]
  plan = Assignment.from_parent(
    first, site.keep, mask=mask, full=False, exact=False
  )
  return plan.weighted((first == place).astype(jnp.float32))


@recipe(
  "dymu",
  family="vlm",
  paper="DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs",
  arxiv="2504.17040",
  code="MikeWangWZHL/dymu",
  training="both",
  evidence="MikeWangWZHL/dymu:src/open_clip/tome.py, LLaVA/llava/model/"
  "language_model/llava_llama_w_exact_vtu_attn.py (c57d75a), its merging, its"
  " thresholds of a batch and its attention run next to these",
  deviations="a budget bounds what remains behind each block, and where the"
  " threshold leaves more the best edges below it merge too (there shapes"
  " follow the image); the mean of the batches' thresholds is learned by"
  " squares (there counted); calibration merges at most half of an image in a"
  " block and divides by sizes (there there is no bound, and 1e-4 is added);"
  " the class token, where it goes on, is never merged; the projector runs on"
  " copies; what is unmerged goes together with no other reduction in the"
  " language model",
)
def dymu(
  budget: Budget = Even(0.5),
  thresholds: tuple[float, ...] | str = (),
  average: float = 0.25,
  unmerge: bool = True,
) -> Slots:
  """Merges similar patches of the encoder, more of them in plainer images.

  The language model computes merged tokens once, and its attention sees them at
  the places of all of their patches. Caches hold every place.

  Args:
    budget: the most patches that remain behind each block.
    thresholds: of cosine similarity, above which tokens merge, one for each
      block of the encoder; (): as many merge as the budget asks for. "learned":
      they are parameters of the model, calibrated by training.
    average: with "learned": the fraction of the patches that calibration leaves
      on average.
    unmerge: False: all places go to the language model as copies, and nothing
      is saved in it.
  """
  if isinstance(thresholds, str) and thresholds != "learned":
    raise ValueError(
      f"thresholds={thresholds!r}: must be numbers or 'learned'"
    )
  check_keep(average, "average")
  module: Any = None
  added = ()
  if thresholds == "learned":
    module, thresholds = learned.Threshold(average), ()
    added = (losses.Sown("threshold"),)
  vision = Reduce(
    bind(merge_similar, thresholds=tuple(thresholds)), budget, at="mlp",
    at_most=0.5, back=Back("end"), learned=module,
  )  # fmt: skip
  inside = Reduce(copies, Encoded(), free=VISUAL, unmerged=True)
  return Slots(
    (inside,) if unmerge else (), losses=added,
    towers={"vision": Slots(vision, proportional=True)},
  )  # fmt: skip
