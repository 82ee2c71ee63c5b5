"""Crops of an image share out what remains, as a view of the whole says.

These recipes act at the input of the language model, where all crops of an
image stand next to each other; what they go by was said by the encoder.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import selection
from tokjax.binding import bind
from tokjax.budgets import Budget, Once, Share
from tokjax.plan import Assignment
from tokjax.recipes.multimodal.encoder import CLASS_MEAN, CLASS_SUM
from tokjax.recipes.multimodal.parts import (
  Parts,
  floors,
  fraction_of,
  part_of,
)
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.signals import Block, Origin, Seen, asks
from tokjax.slots import Slots

# Of a quotient of float32, which must not fall below an integer that it is.
ROUNDING = 1e-4
NEWLINES = (
  "acts on the tokens of any-resolution images without those of the padding,"
  " and newlines stay, outside of the budget"
)
SHARED = "several images in a prompt share the budget by their tokens"


@asks(Origin())
def by_places(
  site: Site, *, early: Seen, late: Seen, share: float, stripes: bool
) -> Assignment:
  """The best of the whole image, and of each crop by how much lies in it."""
  n, parts = site.num_free, Parts.of(site)
  due = site.keep if site.due is None else site.due
  part, many = part_of(parts, due)
  shown = parts.of_image(parts.whole.astype(jnp.int32))
  first = jnp.minimum(floors(share, site.keep)[part], shown)
  first = jnp.where(shown < many, first, part)
  rest = jnp.minimum(part - first, many - shown)

  group = jnp.where(parts.whole, parts.image, n)
  marked = floors(1 - share, n)[shown]
  marks = parts.whole & (
    selection.places_within(site[early], group) < marked
  )
  if stripes:
    o = parts.origin
    place = o.row * o.columns + o.column
    crops = o.high * o.wide
    parts = parts._replace(
      block=1 + place * crops // jnp.maximum(o.rows * o.columns, 1)
    )
  inside = parts.of_block(marks.astype(jnp.int32), parts.origin.crop)
  total = jnp.maximum(parts.of_image(marks.astype(jnp.int32)), 1)
  quota = (inside.astype(jnp.float32) / total * rest).astype(jnp.int32)
  rank = selection.places_within(site[late], parts.crop)
  chosen = (parts.crop < n) & (rank < jnp.where(parts.whole, first, quota))
  index, valid = selection.of_mask(chosen, site.keep)
  return Assignment.select(index, n, valid)


@recipe(
  "hired",
  family="vlm",
  paper="HiRED: Attention-Guided Token Dropping for Efficient Inference of"
  " High-Resolution Vision-Language Models in Resource-Constrained"
  " Environments",
  arxiv="2408.10945",
  code="hasanar1f/HiRED",
  evidence="hasanar1f/HiRED:transformers/src/transformers/models/llava_next/"
  "modeling_llava_next.py (502d6dd), its budgets and selection run next to"
  " these on the same attention",
  deviations="crops are blocks of the whole image, as in the paper (the code"
  " counts in stripes of tokens in raster order: stripes=True);"
  f" {NEWLINES} (there tokens of the padding compete, and newlines go);"
  f" {SHARED}",
)
def hired(
  share: float = 0.5, stripes: bool = False, budget: Budget = Once(Share(0.2))
) -> Slots:
  """The whole image and its crops keep what the class token attends to.

  An early block says where the content is: as much of the rest goes to a crop
  as tokens of the whole image that the class token attends to there lie in it.

  Args:
    share: of what remains, for the view of the whole image.
    stripes: crops are stripes of the whole image, as in the official code.
    budget: how many visual tokens remain.
  """
  if not 0 <= share <= 1:
    raise ValueError(f"share={share}: must lie in [0, 1]")
  first = dataclasses.replace(CLASS_SUM, layer=Block(0))
  rule = bind(
    by_places, early=Seen(question=first), late=Seen(question=CLASS_SUM),
    share=share, stripes=stripes,
  )  # fmt: skip
  return Slots(Reduce(rule, budget, free=VISUAL, position="renumber"))


def crop_ratios(
  parts: Parts, score: Float[Array, "n"], *, ratio, temperature: float
) -> Float[Array, "n"]:
  """The fraction that remains of each crop, seen from its tokens.

  Args:
    parts: of the prompt.
    score: of the tokens of the whole images.
    ratio: the mean fraction.
    temperature: of the softmax over the crops of an image.
  """
  n = parts.image.shape[0]
  inside = parts.of_block(score, parts.block) / temperature
  # One token of the whole image for each crop.
  group = selection.groups(parts.image, parts.block, mask=parts.whole)
  one = parts.whole & (selection.places_within(jnp.zeros((n,)), group) == 0)
  top = parts.of_image(
    jnp.where(one, inside, -jnp.inf), over=jax.ops.segment_max
  )
  each = jnp.where(one, jnp.exp(inside - top), 0.0)
  weight = each / (parts.of_image(each) + 1e-8)
  mean = parts.of_image(weight) / jnp.maximum(
    parts.of_image(one.astype(jnp.float32)), 1
  )
  found = jnp.where(one, jnp.minimum(ratio * (1 + weight - mean), 1.0), 0.0)
  return parts.of_block(found, parts.origin.crop)


def enlarged(parts: Parts, score: Float[Array, "n"]) -> Float[Array, "n"]:
  """Scores of the whole image, bilinear, at the tokens of its crops.

  The whole image covers what crops show without the padding.
  """
  o, n = parts.origin, parts.image.shape[0]
  inside = (parts.image < n) & ~parts.whole

  def along(place, length):
    """Two neighbours in the whole image, and how near the second one is."""
    low, high = parts.least(place), -parts.least(-place)
    scale = length / jnp.maximum(high - low + 1, 1)
    source = jnp.maximum((place - low + 0.5) * scale - 0.5, 0.0)
    before = jnp.minimum(source.astype(jnp.int32), length - 1)
    return before, jnp.minimum(before + 1, length - 1), source - before

  row, column = parts.in_crops()
  top, bottom, down = along(row, o.rows)
  left, right, over = along(column, o.columns)
  start = parts.image * o.rows * o.columns
  at = jnp.where(parts.whole, start + o.row * o.columns + o.column, n)
  table = jnp.zeros((n,)).at[at].set(score, mode="drop")
  take = lambda row, column: table.at[start + row * o.columns + column].get(
    mode="fill", fill_value=0.0
  )
  upper = take(top, left) * (1 - over) + take(top, right) * over
  lower = take(bottom, left) * (1 - over) + take(bottom, right) * over
  return jnp.where(inside, upper * (1 - down) + lower * down, 0.0)


@asks(Origin())
def guided(site: Site, *, score: Seen, temperature: float) -> Assignment:
  """The whole image says how much of each crop remains, and helps to choose."""
  n, parts = site.num_free, Parts.of(site)
  due = site.keep if site.due is None else site.due
  own = site[score]
  real = parts.image < n
  size = parts.of_crop(real.astype(jnp.int32))
  share = fraction_of(site.budget)
  if share is None:
    share = due / jnp.maximum(real.sum(), 1)
    of_whole = jnp.floor(size * share + ROUNDING).astype(jnp.int32)
  else:
    of_whole = floors(share, n)[size]
  ratio = crop_ratios(parts, own, ratio=share, temperature=temperature)
  of_crop = jnp.floor(size * ratio + ROUNDING).astype(jnp.int32)
  quota = jnp.where(parts.whole, jnp.minimum(of_whole, due), of_crop)

  def normed(x):
    length = jnp.sqrt(parts.of_crop(jnp.where(real, x * x, 0.0)))
    return x / jnp.maximum(length, 1e-12)

  both = normed(own) + normed(enlarged(parts, own))
  rank = selection.places_within(
    jnp.where(parts.whole, own, both), parts.crop
  )
  chosen = real & (rank < quota)
  # Beyond the budget the worst of the crops go.
  whole = chosen & parts.whole
  best = selection.places(both, mask=chosen & ~whole)
  chosen = whole | (chosen & (best < due - whole.sum()))
  place = jnp.arange(n)
  start = parts.of_image(
    jnp.where(parts.whole, place, n), over=jax.ops.segment_min
  )
  order = jnp.where(parts.whole, start + rank, place)
  index, valid = selection.of_mask(chosen, site.keep, order=order)
  return Assignment.select(index, n, valid)


@recipe(
  "globalcom2",
  family="vlm",
  paper="Compression with Global Guidance: Towards Training-free"
  " High-Resolution MLLMs Acceleration",
  arxiv="2501.05179",
  code="xuyang-liu16/GlobalCom2",
  evidence="xuyang-liu16/GlobalCom2:llava/model/llava_arch.py (96b2d00), its"
  " ratios, resizing and selection run next to these on the same logits",
  deviations=f"{NEWLINES}, of rows without padding (there of all rows); kept"
  " tokens stand at their places (there at their index without the padding); a"
  " budget bounds what remains, the worst of the crops go beyond it; an image"
  f" without crops is reduced, too; {SHARED}",
)
def globalcom2(
  temperature: float = 10.0, budget: Budget = Once(0.25)
) -> Slots:
  """The whole image guides how its crops are compressed.

  Scores are the logits of the class token in the block ahead of the features.
  What they are in a crop, seen in the whole image, says how much of it remains;
  its tokens are chosen by their own score and by that of their place in the
  whole image. Tokens of the whole image stand in descending order.

  Args:
    temperature: of the softmax over the crops of an image.
    budget: how many visual tokens remain.
  """
  if not temperature > 0:
    raise ValueError(f"temperature={temperature}: must be positive")
  score = Seen(
    question=dataclasses.replace(CLASS_MEAN, form="logits"), ahead=True
  )
  rule = bind(guided, score=score, temperature=temperature)
  return Slots(Reduce(rule, budget, free=VISUAL, position="renumber"))
