"""CoViPAL: a small module says, before a block, which visual tokens stay."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import budgets, learned, losses
from tokjax.binding import bind
from tokjax.budgets import Budget, Once
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import KeepTop
from tokjax.reduce.site import Site
from tokjax.signals import Last, Rows
from tokjax.slots import Slots


def predicted(site: Site) -> Float[Array, "f"]:
  """What the module says of each free token."""
  return site.free(site.learned)


def present(site: Site) -> Float[Array, "f"]:
  """All tokens are there: the module only learns from attention."""
  return jnp.ones((site.num_free,), jnp.float32)


def gate(site: Site, *, temperature: float) -> Float[Array, "f"]:
  """About 1 for the tokens that would stay, about 0 for the others.

  A sigmoid of the distance from the score between the last that stays and the
  first that goes.
  """
  n, mask, score = site.num_free, site.mask, predicted(site)
  mask = jnp.ones((n,), bool) if mask is None else mask
  table = budgets.table(site.budget, n, site.layer, site.depth)
  real = mask.sum(dtype=jnp.int32)
  due = jnp.asarray(table)[real]
  due = jnp.where(due == budgets.NOTHING, real, due)
  ordered = jnp.sort(jnp.where(mask, score, -jnp.inf), descending=True)
  goes, stays = jnp.minimum(due, n - 1), jnp.maximum(due, 1) - 1
  edge = jax.lax.stop_gradient((ordered[goes] + ordered[stays]) / 2)
  soft = jax.nn.sigmoid((score - edge) / temperature)
  return jnp.where(due < real, soft, 1.0)


@recipe(
  "covipal",
  family="vlm",
  paper="CoViPAL: Layer-wise Contextualized Visual Token Pruning for Large"
  " Vision-Language Models",
  arxiv="2508.17243",
  training="learned",
  evidence="weak: the abstract and a summary; the repository tyxqc/CoViPAL"
  " could not be had",
  deviations="not stated by the abstract and chosen here: one attention and an"
  " MLP score the tokens; the attention that guides is that of the last token,"
  " a mean over heads, compared by divergence; the gate of the second stage is"
  " a sigmoid around the score of the last token that would stay",
)
def covipal(
  budget: Budget = Once(0.25),
  phase: str = "gated",
  guide: int | float = 0.5,
  width: int = 32,
  temperature: float = 0.5,
) -> Slots:
  """A module in front of a block reads all tokens and keeps the best visual.

  The language model stays as it is.

  Args:
    budget: how many visual tokens remain, where. Every block that reduces has a
      module of its own.
    phase: of training, which removes nothing in either. "guided": modules
      learn the attention of a deeper block; "gated": the answers, where the log
      of a token's gate is added to the logits of its key.
    guide: the block whose attention guides, as a number or a fraction of the
      depth.
    width: of the modules.
    temperature: of the gate.
  """
  if phase not in ("guided", "gated"):
    raise ValueError(f"phase={phase!r}: must be 'guided' or 'gated'")
  if not (temperature > 0 and width >= 1):
    raise ValueError(
      f"temperature={temperature}, width={width}: must be positive, and 1 or"
      " more"
    )
  soft, added, collect = bind(gate, temperature=temperature), (), ()
  if phase == "guided":
    soft, added = present, (losses.Guided(guide),)
    collect = (Rows(of=Last(), over="mean"),)
  reduce = Reduce(
    KeepTop(predicted), budget, free=VISUAL, soft=soft,
    learned=learned.ContextScore(width),
  )  # fmt: skip
  return Slots(reduce, losses=added, collect=collect)
