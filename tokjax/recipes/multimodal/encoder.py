"""Visual tokens are chosen before the language model, by what an encoder says.

These recipes fill towers of a vision-language model; see
`tokjax.models.vlm.VisionLanguage`. Those that look at attention act at the end
of the vision tower, on the features that the projector takes.
"""

import dataclasses

import jax.numpy as jnp

from tokjax import selection
from tokjax.binding import bind
from tokjax.budgets import AtEnd, Budget, Count, Once, Square
from tokjax.plan import Assignment, Plan
from tokjax.recipes.multimodal import merging
from tokjax.recipes.registry import recipe
from tokjax.recipes.vision.baselines import average_cells, drop_random
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_top
from tokjax.reduce.site import Site
from tokjax.signals import CLASS, Keys, Rows
from tokjax.slots import Slots

CLASS_SUM = dataclasses.replace(CLASS, over="sum")
CLASS_MEAN = dataclasses.replace(CLASS, over="mean")


@recipe(
  "random_visual",
  family="baseline",
  paper="-",
  evidence="a definition; TianfanPeng/VLMUniPruneBench:methods/"
  "Random_PreLLM.py (f93768f)",
  deviations="tokens stay in order (the benchmark's arrive shuffled)",
)
def random_visual(budget: Budget = Once(0.5)) -> Slots:
  """Keeps visual tokens drawn without replacement, for each image anew."""
  return Slots(Reduce(drop_random, budget)).within("projector")


@recipe(
  "avgpool_visual",
  family="baseline",
  paper="-",
  evidence="torch.nn.AdaptiveAvgPool2d over the grid of visual tokens",
)
def avgpool_visual(budget: Budget = Square(0.5)) -> Slots:
  """Average pooling of the encoder's features to a smaller grid."""
  return Slots(Reduce(average_cells, budget)).within("projector")


def dominant_and_contextual(
  site: Site, *, share: tuple[int, int], score: Rows, metric: Keys
) -> Plan:
  """Keeps the best; evenly spaced ones of the others gather the rest.

  The class token counts among the kept ones, whose number is rounded up.
  """
  n, mask = site.num_free, site.mask
  mask = jnp.ones((n,), bool) if mask is None else mask
  contextual = lambda kept: (kept + 1) * share[0] // share[1]
  due = site.keep if site.due is None else site.due
  few = contextual(due)
  best = mask & (selection.places(site[score], mask=mask) < due - few)
  rest = mask & ~best
  targets = merging.strided(rest, contextual(site.keep), few)
  keys = site[metric].astype(jnp.float32).mean(axis=0)
  into = merging.most_similar(keys, targets)
  own = jnp.arange(n)
  chosen = best | jnp.zeros((n,), bool).at[targets.index].set(targets.valid)
  parent = jnp.where(chosen, own, jnp.where(rest, into, n))
  plan = Assignment.from_parent(
    parent, site.keep, order=jnp.where(best, own, own + n),
    mask=None if site.mask is None else mask, exact=False,
  )  # fmt: skip
  return merging.target_plus_mean(plan)


@recipe(
  "visionzip",
  family="vlm",
  paper="VisionZip: Longer is Better but Not Necessary in Vision Language"
  " Models",
  evidence="dvlab-research/VisionZip:visionzip/clip_encoder.py (3151f6d)",
  deviations="of all tokens 5 of 32 are contextual, as in each published"
  " setting; one image at a time is a crop of an any-resolution image",
)
def visionzip(budget: Budget = Count(63)) -> Slots:
  """The class token picks dominant tokens; the others merge into a few.

  The class token goes on to the language model: 63 patches make 64 tokens.
  """
  rule = bind(
    dominant_and_contextual, share=(5, 32), score=CLASS_SUM, metric=Keys()
  )
  reduce = Reduce(rule, AtEnd(budget), at="output")
  return Slots(reduce, pass_class=True).within("vision")


@recipe(
  "fastervlm",
  family="vlm",
  paper="[CLS] Attention is All You Need for Training-Free Visual Token"
  " Pruning: Make VLM Inference Faster",
  evidence="Theia-4869/FasterVLM:llava/model/llava_arch.py (f5d5f12)",
)
def fastervlm(budget: Budget = Count(144)) -> Slots:
  """Keeps the patches that the class token attends to most, in their order."""
  reduce = Reduce(keep_top(CLASS_MEAN), AtEnd(budget), at="output")
  return Slots(reduce).within("vision")
