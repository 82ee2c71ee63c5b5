"""Visual tokens of vision-language-action models."""

import jax.numpy as jnp

from tokjax import diversity, scores, selection
from tokjax.binding import bind
from tokjax.budgets import Budget, Count, Once
from tokjax.cache.kv import KV
from tokjax.cache.tally import Tally
from tokjax.plan import Plan
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_best, keep_selected
from tokjax.reduce.site import Site
from tokjax.signals import (
  Attention,
  Block,
  Hidden,
  Last,
  Of,
  Question,
  Recalled,
  Received,
  Rows,
)
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


# As they enter the language model.
EMBEDDED = Hidden(Block(0))


def now_and_before(
  site: Site, *, question: Question, before: Recalled, embedded: Hidden
) -> Plan:
  """The best now or before; of these, where they are many, the most unlike.

  Where nothing is recalled the best now.
  """
  n, due = site.num_free, site.keep if site.due is None else site.due
  free = jnp.ones((n,), bool) if site.mask is None else site.mask
  now, recalled = site[question].astype(jnp.float32), site[before]
  now = now.mean(axis=0) if now.ndim > 1 else now
  best = lambda score: free & (selection.places(score, mask=free) < due)
  told = (jnp.where(free, recalled, 0.0) != 0).any()
  chosen = best(now) | (best(recalled) & told)
  x = site[embedded].astype(jnp.float32)
  distance = 1 - scores.cosine(x, x)
  others = chosen[None] & ~jnp.eye(n, dtype=bool)
  nearest = jnp.where(others, distance, jnp.inf).min(axis=1)
  picked = diversity.max_min(
    distance, site.keep, first=nearest, mask=chosen, count=site.due
  )
  return keep_selected(site, picked)


@recipe(
  "vla_pruner",
  family="vlm",
  paper="VLA-Pruner: Temporal-Aware Dual-Level Visual Token Pruning for"
  " Efficient Vision-Language-Action Inference",
  arxiv="2511.16449",
  code="MINT-SJTU/VLA-Pruner",
  evidence="MINT-SJTU/VLA-Pruner:src/openvla/transformers/src/transformers/"
  "models/llama/modeling_llama.py, src/openvla/prismatic/extern/hf/"
  "modeling_prismatic.py (fa5bfed), its selection run next to this on the same"
  " arrays",
  deviations="the latest step counts most, as in the paper (the official code"
  " gives the oldest the largest weight); recalled attention is that of the"
  " upper half of the blocks, as in the paper (there of block 15), see"
  " `tokjax.models.control.Controller`; every example keeps its own tokens;"
  " without a controller nothing is recalled, and attention to the prompt alone"
  " decides (there the option without temporal guidance)",
)
def vla_pruner(
  budget: Budget = Once(0.5, 3), queries: str = "all", since: float = 0.5
) -> Slots:
  """Visual tokens that the prompt attends to, or that the last actions did.

  The best of both are joined, and pruned to as many as remain by keeping those
  that are least alike. `tokjax.models.control.Controller` runs a model with
  this recipe over the steps of a robot, and recalls.

  Args:
    budget: how many visual tokens remain, and where.
    queries: "all" of the prompt in the block before, or the "last".
    since: the first block whose attention can be recalled, as a fraction of the
      depth; the cache adds it up from there on.
  """
  if not 0 <= since < 1:
    raise ValueError(f"since={since}: must lie in [0, 1)")
  if queries not in ("all", "last"):
    raise ValueError(f"queries={queries!r}: must be 'all' or 'last'")
  question = Received(-1) if queries == "all" else Rows(-1, of=Last())
  rule = bind(
    now_and_before, question=question, before=Recalled(), embedded=EMBEDDED
  )
  cache = KV(trim=Tally(since=since))
  return Slots(Reduce(rule, budget, free=VISUAL), cache=cache)
