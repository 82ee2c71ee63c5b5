"""Visual tokens are chosen before the language model, by what an encoder says.

These recipes fill towers of a vision-language model; see
`tokjax.models.vlm.VisionLanguage`. Most act at the end of the vision tower, on
the features that the projector takes.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import diversity, scores, selection
from tokjax.binding import bind
from tokjax.budgets import AtEnd, Budget, Count, Once, Share, Square
from tokjax.plan import Assignment, Plan
from tokjax.recipes.multimodal import merging
from tokjax.recipes.registry import recipe
from tokjax.recipes.vision.baselines import average_cells, drop_random
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import KeepTop, keep_best, keep_selected, keep_top
from tokjax.reduce.site import Site
from tokjax.signals import CLASS, Block, Grid, Keys, Received, Rows, asks
from tokjax.slots import Slots

CLASS_SUM = dataclasses.replace(CLASS, over="sum")
CLASS_MEAN = dataclasses.replace(CLASS, over="mean")


@recipe(
  "random_visual",
  family="vlm",
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
  family="vlm",
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
  arxiv="2412.04467",
  code="dvlab-research/VisionZip",
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
  arxiv="2412.01818",
  code="Theia-4869/FasterVLM",
  evidence="Theia-4869/FasterVLM:llava/model/llava_arch.py (f5d5f12)",
)
def fastervlm(budget: Budget = Count(144)) -> Slots:
  """Keeps the patches that the class token attends to most, in their order."""
  reduce = Reduce(keep_top(CLASS_MEAN), AtEnd(budget), at="output")
  return Slots(reduce).within("vision")


def total(site: Site, **rows: Rows) -> Float[Array, "f"]:
  """The sum of the answers to several questions."""
  return jnp.stack([site[question] for question in rows.values()]).sum(axis=0)


@recipe(
  "vtc_cls",
  family="vlm",
  paper="[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs",
  arxiv="2412.05819",
  code="THU-MIG/VTC-CLS",
  evidence="THU-MIG/VTC-CLS:llava/model/llava_arch.py (e41ac9b)",
  deviations="the official first layer is an argument without a default; here"
  " the last 12 blocks are summed",
)
def vtc_cls(blocks: int = 12, budget: Budget = Count(144)) -> Slots:
  """As FasterVLM, with class attention summed over the last blocks.

  Args:
    blocks: last blocks that are summed over.
    budget: patches that remain.
  """
  rows = {
    f"row_{i}": dataclasses.replace(CLASS_MEAN, layer=-i) for i in range(blocks)
  }
  rule = KeepTop(bind(total, **rows))
  return Slots(Reduce(rule, AtEnd(budget), at="output")).within("vision")


def received(site: Site, *, question: Received) -> Float[Array, "f"]:
  """Attention that patches receive from all tokens, mean over heads."""
  return site[question].mean(axis=0)


@asks(Grid())
def objects_and_registers(
  site: Site, *, middle: Received, late: Received, share: float
) -> Plan:
  """Anchors of a middle block with their neighbours, then the best of a late.

  A neighbour is one index or one row away, held within the image; at the sides
  it is on the next row.
  """
  columns, n = site.grid[1], site.num_free
  shallow, deep = received(site, question=middle), received(site, question=late)
  anchors = round(site.keep * share / 5)
  at = selection.top_indices(shallow, anchors)
  steps = jnp.asarray([0, -1, 1, -columns, columns])
  near = jnp.clip(at[:, None] + steps[None], 0, n - 1)
  chosen = jnp.zeros((n,), bool).at[near].set(True)
  return keep_best(site, jnp.where(chosen, jnp.inf, deep))


@recipe(
  "hiprune",
  family="vlm",
  paper="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention"
  " in Vision-Language Models",
  arxiv="2508.00553",
  code="Danielement321/HiPrune",
  evidence="Danielement321/HiPrune:LLaVA/llava/model/llava_arch.py (6e83a12)",
  deviations="the object block is a fraction of the depth (the 9th of the 23"
  " that LLaVA-1.5 runs); the width of the grid is that of the image",
)
def hiprune(
  share: float = 0.1, middle: float = 0.35, budget: Budget = Count(192)
) -> Slots:
  """A middle block finds objects, the last block what is global.

  Args:
    share: of the tokens that objects and their neighbours may take.
    middle: the block that finds objects, as a fraction of the depth.
    budget: how many patches remain.
  """
  rule = bind(
    objects_and_registers, middle=Received(Block(middle)), late=Received(),
    share=share,
  )  # fmt: skip
  return Slots(Reduce(rule, AtEnd(budget), at="output")).within("vision")


def rows_first(site: Site, *, question: Received) -> Float[Array, "f"]:
  """Every patch scores what its row of the image receives together."""
  score = received(site, question=question)
  return jnp.repeat(score.reshape(site.grid).sum(axis=1), site.grid[1])


@recipe(
  "fopru",
  family="vlm",
  paper="FoPru: Focal Pruning for Efficient Large Vision-Language Models",
  arxiv="2411.14164",
  evidence="weak: abstract and a digest of arXiv 2411.14164; no code was found",
  deviations="that significance is the attention received in the block of the"
  " features is a guess",
)
def fopru(rows: bool = False, budget: Budget = Share(0.25)) -> Slots:
  """Keeps the patches, or the rows of patches, that receive most attention.

  Args:
    rows: whole rows of patches stay or go.
    budget: patches that remain.
  """
  score = asks(Grid())(rows_first) if rows else received
  rule = KeepTop(bind(score, question=Received()))
  return Slots(Reduce(rule, AtEnd(budget), at="output")).within("vision")


def farthest(site: Site) -> Plan:
  """Farthest points by cosine; the first has the farthest nearest neighbour."""
  distance = 1 - scores.cosine(*2 * (site.x.astype(jnp.float32),))
  first = diversity.nearest_other(distance, site.mask)
  picked = diversity.max_min(
    distance, site.keep, first=first, mask=site.mask, count=site.due
  )
  return keep_selected(site, picked)


@recipe(
  "divprune",
  family="vlm",
  paper="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal"
  " Models",
  arxiv="2503.02175",
  code="vbdi/divprune",
  evidence="vbdi/divprune:LLaVA/llava/model/llava_arch.py (799e2d9)",
  deviations="a token is never picked twice (the official code can, among exact"
  " duplicates); tokens of one image are compared, not those of all",
)
def divprune(budget: Budget = Once(0.098)) -> Slots:
  """Keeps projected tokens that are as far from each other as possible."""
  return Slots(Reduce(farthest, budget, at="output")).within("projector")
