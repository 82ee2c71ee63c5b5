"""Recoverable compression: what the image or the words single out stays."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import scores, selection
from tokjax.binding import bind
from tokjax.budgets import Budget, Once
from tokjax.plan import Mixture
from tokjax.recipes.multimodal.diverse import WORDS, words
from tokjax.recipes.multimodal.prumerge import with_neighbours
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.signals import CLASS, Seen
from tokjax.slots import Slots

# The width of CLIP's projection, by whose root similarities are divided there.
PROJECTED = 768
# What a similarity counts next to a cosine of neighbours.
TEXT = 50 / PROJECTED**0.5


def as_one_head(logits: Float[Array, "h n"]) -> Float[Array, "n"]:
  """Attention of all heads as one of the full width."""
  heads = logits.shape[0]
  return jax.nn.softmax(logits.astype(jnp.float32).sum(axis=0) / heads**0.5)


ATTENDED = Seen(
  question=dataclasses.replace(CLASS, form="logits"), ahead=True,
  by=as_one_head,
)  # fmt: skip


def outliers_and_clusters(
  site: Site, *, attended: Seen, width: int | None, neighbours: int
) -> Mixture:
  """Outliers of attention and of likeness to words, then clusters of others.

  Both are kept as they are, in order. Behind them stand centres of the others
  with what is near them, each times its attention, and one token of the rest.
  """
  n, m = site.num_free, site.keep
  due = m if site.due is None else site.due
  mask = jnp.ones((n,), bool) if site.mask is None else site.mask
  x, score = site.x.astype(jnp.float32), site[attended]
  text = jnp.where(words(site)[:, None], site.tokens.x, 0.0).sum(axis=0)
  # The mean of the words has the direction of their sum.
  like = scores.cosine(x, text.astype(jnp.float32)[None])[:, 0]
  rank = selection.places(score, mask=mask)
  count = lambda values, k, among: scores.local_outliers(
    values, k, mask=among
  ).sum()
  seen = mask & (rank < count(score, 20, mask))
  least = jnp.where(mask, like, jnp.inf).min()
  lower = jnp.where(seen, least, like)
  all_, left = jnp.maximum(mask.sum(), 1), (mask & ~seen).sum()
  many = left * count(lower, 20, mask) // all_
  told = mask & ~seen & (selection.places(lower, mask=mask & ~seen) < many)
  kept = seen | told
  others = mask & ~kept
  size = kept.sum() if width is None else width
  many = size * count(score, 10, others) // jnp.maximum(others.sum(), 1)
  centre = others & (selection.places(score, mask=others) < many)
  # Beyond the room the last ones go: centres, then what words single out.
  tier = jnp.where(seen, 0, jnp.where(told, 1, jnp.where(centre, 2, 3)))
  first = jnp.argsort(jnp.lexsort((rank, tier))) < due - 1
  kept, centre = kept & first, centre & first
  order = jnp.where(kept, jnp.arange(n), n + rank)
  index, real = selection.of_mask(kept | centre, m - 1, order=order)
  rest = mask & ~kept & ~centre
  extra = rest.any() & (centre.any() | ~kept.any())
  similar = scores.cosine(x[index], x) + TEXT * lower[None]
  weight = with_neighbours(similar, score, index, others, neighbours)
  itself = jnp.arange(n)[None] == index[:, None]
  weight = jnp.where(centre[index][:, None], weight, itself)
  valid = jnp.append(real, extra)
  weight = jnp.concatenate([weight, jnp.where(rest, score, 0.0)[None]])
  share = jnp.concatenate([itself, rest[None]]) & valid[:, None]
  share = share.astype(jnp.float32)
  weight = jnp.where(valid[:, None], weight, 0.0).astype(jnp.float32)
  anchor = jnp.append(index, jnp.argmax(rest))
  return Mixture(weight, share, share.T, anchor, valid)


@recipe(
  "recoverable",
  family="vlm",
  paper="Recoverable Compression: A Multimodal Vision Token Recovery Mechanism"
  " Guided by Text Information",
  arxiv="2409.01179",
  code="banjiuyufen/Recoverable-Compression",
  evidence="DamonZhao-sfu/RecoverableCompression, a fork of the authors' code:"
  "llava/model/multimodal_encoder/clip_encoder.py (b53840f), its filters and"
  " clusters run next to this on the same arrays",
  deviations=f"{WORDS}, their mean (the official code compares patches with the"
  " first line of the prompt in CLIP); neighbours are near by the cosine of"
  " projected tokens (there of keys, which are looked up at the places of other"
  " tokens); centres are the outliers' share of the width of CLIP's features,"
  " as there, where the number of kept tokens is meant (width=None); a budget"
  " bounds how many tokens remain, centres go first beyond it; of several"
  " images in a prompt all tokens compete; the token of the rest stays where it"
  " is alone (there nothing would)",
)
def recoverable(
  budget: Budget = Once(0.25), width: int | None = 1024, neighbours: int = 32
) -> Slots:
  """Outliers of class attention, and what the words recover of the rest.

  The block ahead of the features is asked, with all heads as one. What is left
  is merged into a few tokens.

  Args:
    budget: how many visual tokens remain, at most.
    width: centres of clusters are as many as the outliers' share of this; None:
      of the number of kept tokens.
    neighbours: how many tokens a centre takes in.
  """
  if neighbours < 1 or (width is not None and width < 1):
    raise ValueError(
      f"width={width}, neighbours={neighbours}: must be 1 or more"
    )
  rule = bind(
    outliers_and_clusters, attended=ATTENDED, width=width,
    neighbours=neighbours,
  )  # fmt: skip
  return Slots(Reduce(rule, budget, free=VISUAL, position="renumber"))
