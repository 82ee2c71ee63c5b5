"""DART: duplicates of a few pivots are dropped, unlike tokens stay."""

import jax
import jax.numpy as jnp

from tokjax import scores, selection
from tokjax.binding import bind
from tokjax.budgets import Multiple, Once
from tokjax.plan import Plan
from tokjax.recipes.multimodal.pruning import VISUAL, behind_image
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_best
from tokjax.reduce.site import Site
from tokjax.signals import Keys
from tokjax.slots import Slots


def unlike_pivots(site: Site, *, keys: Keys, visual: int, text: int) -> Plan:
  """Tokens with long keys are pivots; each keeps those least like it.

  Pivots come one after the other, visual ones first, and share out what the
  visual pivots leave: what does not divide goes to the first of them. A
  prompt with fewer tokens behind the image has fewer pivots.
  """
  n, x = site.num_free, site.tokens.x.astype(jnp.float32)
  free = jnp.ones((n,), bool) if site.mask is None else site.mask
  due = site.keep if site.due is None else site.due
  length = jnp.abs(site.whole(keys).astype(jnp.float32)).sum(axis=(0, 2))
  behind = behind_image(site.tokens) & ~free
  own, of_text = (
    selection.top_k(length, min(many, n), mask=where)
    for many, where in ((visual, free), (text, behind))
  )
  chosen = own.valid & (jnp.arange(min(visual, n)) < due)
  pivot = jnp.concatenate([own.index, of_text.index])
  real = jnp.concatenate([chosen, of_text.valid])
  pivots, left = jnp.maximum(real.sum(), 1), due - chosen.sum()
  rank = jnp.cumsum(real) - 1
  quota = jnp.where(real, left // pivots + (rank < left % pivots), 0)
  cosine = scores.cosine(x[pivot], x)

  def step(i, kept):
    open_ = free & ~kept
    least = selection.places(-cosine[i], mask=open_)
    return kept | (open_ & (least < quota[i]))

  kept = jnp.zeros((n,), bool).at[own.index].set(chosen)
  kept = jax.lax.fori_loop(0, pivot.shape[0], step, kept)
  return keep_best(site, kept.astype(jnp.float32))


@recipe(
  "dart",
  family="vlm",
  paper="Stop Looking for Important Tokens in Multimodal Language Models:"
  " Duplication Matters More",
  arxiv="2502.11494",
  code="ZichenWen1/DART",
  evidence="xqy1111111/DART, a fork of the official code:llava/model/"
  "language_model/modeling_llama_self.py (d6a5af6), its selection run next to"
  " this on the same arrays",
  deviations="pivots come visual ones first, in descending length (there in the"
  " order of a Python set); cosines are those of hidden states as they are"
  " (there behind the final norm, whose weights a rule does not see)",
)
def dart(layer: int | float = 2, visual: int = 4, text: int = 4) -> Slots:
  """Keeps the visual tokens that are least like a few pivots.

  Pivots are the tokens of the image, and those behind it, whose keys in the
  block before are longest. By default 22.2 % remain, see
  `tokjax.budgets.Multiple`.

  Args:
    layer: the block whose input is reduced.
    visual, text: how many pivots there are of each.
  """
  if visual < 1 or text < 0:
    raise ValueError(
      f"visual={visual}, text={text}: must be 1 or more, and 0 or more"
    )
  rule = bind(
    unlike_pivots, keys=Keys(layer=-1, rotated=True), visual=visual, text=text
  )
  budget = Multiple(0.222, each=visual + text, more=visual)
  return Slots(Reduce(rule, Once(budget, layer), free=VISUAL))
