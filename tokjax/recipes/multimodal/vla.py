"""Visual tokens of vision-language-action models."""

import jax.numpy as jnp

from tokjax import scores, selection
from tokjax.binding import bind
from tokjax.budgets import Budget, Count, Once
from tokjax.plan import Plan
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_best
from tokjax.reduce.site import Site
from tokjax.signals import Attention, Of, Question, Rows
from tokjax.slots import Slots
from tokjax.tokens import Kind


def key_task_and_diverse(
  site: Site, *, question: Question, key: int, share: float
) -> Plan:
  """Key tokens, more of the relevant ones, and those least like the key ones.

  The latter are compared with the key tokens alone, once: of two duplicates
  that are far from these both stay.
  """
  tokens, due = site.tokens, site.keep if site.due is None else site.due
  free = jnp.ones((site.num_free,), bool) if site.mask is None else site.mask
  if isinstance(question, Attention):
    sent = site.whole(question).astype(jnp.float32).mean(axis=0)
    context = tokens.of_kind((Kind.TEXT,))
    score = site.free(jnp.where(context[None], sent, 0.0).sum(axis=1))
  else:
    score = site[question]
  more = [int(max(i - key, 0) * share) for i in range(site.keep + 1)]
  task = jnp.asarray(more)[due]
  rank = selection.places(score, mask=free)
  best = free & (rank < jnp.minimum(key, due))
  chosen = free & (rank < jnp.minimum(key, due) + task)
  x = site.x.astype(jnp.float32)
  nearest = jnp.where(best[None], scores.cosine(x, x), -jnp.inf).max(axis=1)
  others = free & ~chosen
  far = selection.places(-nearest, mask=others) < due - chosen.sum()
  return keep_best(site, (chosen | (others & far)).astype(jnp.float32))


@recipe(
  "efficientvla",
  family="vlm",
  paper="EfficientVLA: Training-Free Acceleration and Compression for"
  " Vision-Language-Action Models",
  arxiv="2506.10100",
  evidence="weak: the text of the paper; no code was found",
  deviations="the visual tokens only (the paper also removes blocks and keeps"
  " states of the action head from step to step); relevance is the attention of"
  " text to visual tokens in the block before, as the formula of the paper, the"
  " other way round, is blind to text behind the image (sent=True)",
)
def efficientvla(
  key: int = 4,
  share: float = 0.5,
  sent: bool = False,
  budget: Budget = Once(Count(56), 2),
) -> Slots:
  """Visual tokens that the task is about, and some that are unlike these.

  Args:
    key: how many tokens are key to the task: the most relevant.
    share: of the tokens that remain beyond these, chosen by relevance too.
    sent: relevance is attention from visual tokens to text, which takes the
      whole map of attention.
    budget: how many visual tokens remain, and where.
  """
  if key < 1 or not 0 <= share <= 1:
    raise ValueError(
      f"key={key}, share={share}: must be 1 or more, and lie in [0, 1]"
    )
  question = Rows(of=Of((Kind.TEXT,)), layer=-1, over="mean")
  rule = bind(
    key_task_and_diverse, question=Attention(layer=-1) if sent else question,
    key=key, share=share,
  )  # fmt: skip
  return Slots(Reduce(rule, budget, free=VISUAL))
