"""VFlowOpt: one map of importance, from the encoder, prunes at three places."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import selection
from tokjax.binding import bind
from tokjax.budgets import Once, Stages, check_keep
from tokjax.plan import Assignment
from tokjax.recipes.multimodal.crops import NEWLINES, SHARED
from tokjax.recipes.multimodal.parts import Parts, part_of
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_top
from tokjax.reduce.site import Site
from tokjax.signals import Attention, Origin, Seen, asks
from tokjax.slots import Slots


def flow(
  attention: Float[Array, "h n n"], *, threshold: float
) -> Float[Array, "n"]:
  """What patches receive from those that receive much themselves.

  Args:
    attention: of one image, rows are queries.
    threshold: those receive much that receive so many times the mean; where
      none does, the one that receives most.
  """
  mean = attention.astype(jnp.float32).mean(axis=0)
  received = mean.mean(axis=0)
  much = received > threshold * received.mean()
  much = jnp.where(much.any(), much, received == received.max())
  return jnp.where(much[:, None], mean, 0.0).sum(axis=0) / much.sum()


def cells(parts: Parts, cell: float) -> Int[Array, "n"]:
  """The square cell of the grid that each token lies in, as a number.

  The view of the whole image is one grid, its crops without the padding are
  another.
  """
  down, right = parts.in_crops()
  low = parts.least(jnp.stack([down, right], axis=-1))
  whole = parts.whole
  row = jnp.where(whole, parts.origin.row, down - low[..., 0])
  column = jnp.where(whole, parts.origin.column, right - low[..., 1])
  step = lambda x: jnp.floor(x / cell).astype(jnp.int32)
  return selection.groups(
    parts.image, (~whole).astype(jnp.int32), step(row), step(column),
    mask=parts.image < whole.shape[0],
  )  # fmt: skip


@asks(Origin())
def recycle_cells(
  site: Site, *, importance: Seen, cell: float
) -> Assignment:
  """Keeps the best; the others become one token in each cell that has any.

  That one is their mean by importance, at the place of the most important. To
  make room, about as many of the best go as there are cells. An image without
  crops only loses tokens.
  """
  n, parts = site.num_free, Parts.of(site)
  real = parts.image < n
  due = site.keep if site.due is None else site.due
  part, many = part_of(parts, due)
  score = site[importance]
  made = jnp.asarray([int(i / (cell * cell)) for i in range(n + 1)], jnp.int32)
  cut = real & (parts.of_image(parts.whole.astype(jnp.int32)) < many)
  room = part - jnp.where(cut, made[many], 0)
  best = real & (selection.places_within(score, parts.image) < room)
  group = jnp.where(cut & ~best, cells(parts, cell), n)
  top = (group < n) & (selection.places_within(score, group) == 0)
  # Beyond the budget the least cells go, and the worst of the best join cells.
  top = top & (selection.places(score, mask=top) < due)
  rank = selection.places(score, mask=best)
  best = best & (rank < due - top.sum())
  return _joined(site, parts, best, top, score, cell)


def _joined(
  site: Site,
  parts: Parts,
  best: Bool[Array, "n"],
  top: Bool[Array, "n"],
  score: Float[Array, "n"],
  cell: float,
) -> Assignment:
  """The plan in which what is not best joins the top token of its cell."""
  n, place = site.num_free, jnp.arange(site.num_free)
  number = cells(parts, cell)
  into = jnp.full((n + 1,), n).at[jnp.where(top, number, n)].set(
    jnp.where(top, place, n)
  )
  into = into.at[n].set(n)[number]
  parent = jnp.where(best | top, place, into)
  plan = Assignment.from_parent(
    parent, site.keep, mask=parts.image < n, full=False, exact=False
  )
  return plan.weighted(score)


@recipe(
  "vflowopt",
  family="vlm",
  paper="VFlowOpt: A Token Pruning Framework for LMMs with Visual Information"
  " Flow-Guided Optimization",
  arxiv="2508.05211",
  code="sihany077/VFlowOpt",
  evidence="sihany077/VFlowOpt:src/LLaVA-OneVision/llava/model/"
  "multimodal_encoder/siglip_encoder.py, language_model/"
  "llava_qwen_training_free.py (129eeef), its map and recycling run next to"
  " these on the same attention",
  deviations=f"{NEWLINES} (there they count and are never removed); budgets are"
  " fractions of the initial tokens (there the second and third of the current"
  " ones) and bound what recycling leaves; the entropy of patches, which every"
  " published setting weighs with 0, is left out; where no patch receives as"
  " much as the threshold says the one that receives most counts (there nothing"
  f" is a number); {SHARED}",
)
def vflowopt(
  ratios: tuple[float, ...] = (0.2651, 0.9833, 0.8773),
  cell: float = 15.58,
  threshold: float = 34.76,
) -> Slots:
  """The encoder's attention prunes before the language model and twice inside.

  The defaults leave a quarter of the tokens on average. Published settings for
  a tenth are ratios (0.1166, 1.0, 0.6011), cell 17.39, threshold 39.26; for a
  half (0.7233, 0.7487, 0.487), 11.76, 28.68. `scripts.vflowopt_search` finds
  those of another model.

  Args:
    ratios: what remains of the tokens before the language model, and of these
      at 9 and at 18 of 28 blocks.
    cell: side of the cells in which what goes is merged, in patches.
    threshold: attention of those patches counts that receive so many times as
      much as the mean.
  """
  if len(ratios) != 3:
    raise ValueError(f"ratios={ratios}: must be three numbers")
  for ratio in ratios:
    check_keep(ratio, "ratios")
  if not (cell >= 1 and threshold >= 0):
    raise ValueError(
      f"cell={cell}, threshold={threshold}: must be 1 or more, and 0 or more"
    )
  seen = Seen(question=Attention(), by=bind(flow, threshold=threshold))
  first = bind(recycle_cells, importance=seen, cell=cell)
  inside = Stages({
    9 / 28: round(ratios[0] * ratios[1], 6),
    18 / 28: round(ratios[0] * ratios[1] * ratios[2], 6),
  })
  return Slots((
    Reduce(first, Once(ratios[0]), free=VISUAL, position="renumber"),
    Reduce(keep_top(seen), inside, free=VISUAL),
  ))
