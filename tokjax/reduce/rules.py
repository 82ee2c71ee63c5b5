"""Rules that many methods share: keep the best by some score."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import scores, selection
from tokjax.binding import Bound, bind
from tokjax.plan import Assignment, Plan
from tokjax.reduce.site import Site
from tokjax.signals import Question


def keep_best(site: Site, score: Float[Array, "f"]) -> Plan:
  """Keeps the free tokens with the largest scores, in their order."""
  top = selection.top_k(score, site.keep, mask=site.mask, count=site.due)
  index, valid = selection.in_order(top)
  return Assignment.select(index, site.num_free, valid)


def _keep_top(
  site: Site, *, question: Question, pool: int, pooling: str, sign: int
) -> Plan:
  score = site[question].astype(jnp.float32)
  if score.ndim > 1:
    score = score.mean(axis=tuple(range(score.ndim - 1)))
  if pool > 1:
    if site.mask is not None:
      score = jnp.where(site.mask, score, 0.0)
    score = scores.pool(score, pool, pooling)
  return keep_best(site, sign * score)


def keep_top(
  question: Question,
  *,
  pool: int = 1,
  pooling: Literal["avg", "max"] = "avg",
  largest: bool = True,
) -> Bound:
  """The rule that keeps the tokens with the largest answers to a question.

  Args:
    question: its answer is a number for each token, or one for each head and
      token, which is averaged over heads.
    pool: answers are pooled over so many neighbours first (odd); 1: they are
      not.
    pooling: see `tokjax.scores.pool`.
    largest: False keeps the smallest.
  """
  return bind(
    _keep_top, question=question, pool=pool, pooling=pooling,
    sign=1 if largest else -1,
  )  # fmt: skip
