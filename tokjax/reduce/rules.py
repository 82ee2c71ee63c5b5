"""Rules that many methods share: keep the best by some score."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax import scores, selection, signals
from tokjax.binding import bind
from tokjax.plan import Assignment, Plan
from tokjax.reduce.site import Site
from tokjax.signals import Question


def keep_best(
  site: Site,
  score: Float[Array, "f"],
  eligible: Bool[Array, "f"] | None = None,
) -> Plan:
  """Keeps the free tokens with the largest scores, in their order.

  Args:
    site: where.
    score: of the free tokens.
    eligible: False for tokens that never stay.
  """
  mask = site.mask
  if eligible is not None:
    mask = eligible if mask is None else mask & eligible
  top = selection.top_k(score, site.keep, mask=mask, count=site.due)
  return keep_selected(site, top)


def keep_selected(site: Site, picked: selection.Selection) -> Assignment:
  """Keeps the free tokens that were picked, in their order."""
  index, valid = selection.in_order(picked)
  return Assignment.select(index, site.num_free, valid)


@dataclasses.dataclass(frozen=True)
class KeepTop:
  """The rule that keeps the tokens with the largest scores.

  It serves blocks of a model, the end of a prompt and every step of a cache.

  Attributes:
    score: `Site -> [f]`, with its questions; hashable. A token with the score
      minus infinity never stays.
    strict: whether such scores occur.
  """

  score: Callable[[Site], Array]
  strict: bool = False

  # Nothing is merged, so that entries need no counts.
  selects = True

  @property
  def asks(self) -> tuple[Any, ...]:
    return signals.questions_of(self.score)

  def __call__(self, site: Site) -> Plan:
    score = self.score(site)
    return keep_best(site, score, score > -jnp.inf if self.strict else None)


def newest(site: Site) -> Float[Array, "f"]:
  """The later the better."""
  return site.position[:, 0]


KEEP_NEWEST = KeepTop(newest)


def answer(
  site: Site,
  *,
  question: Question,
  pool: int = 1,
  pooling: Literal["avg", "max"] = "avg",
  sign: int = 1,
) -> Float[Array, "f"]:
  """A question's answer as a score: mean over heads, pooled over neighbours."""
  score = site[question].astype(jnp.float32)
  if pool > 1:
    if site.mask is not None:
      score = jnp.where(site.mask, score, 0.0)
    score = scores.pool(score, pool, pooling)
  if score.ndim > 1:
    score = score.mean(axis=tuple(range(score.ndim - 1)))
  return sign * score


ANY_KEYS = signals.Keys(rotated=None)


@signals.asks(ANY_KEYS)
def key_norm(site: Site) -> Float[Array, "f"]:
  """Minus the length of the key, which no rotation changes (Knorm)."""
  k = site[ANY_KEYS].astype(jnp.float32)
  return -jnp.linalg.norm(k, axis=-1).mean(axis=0)


def keep_top(
  question: Question,
  *,
  pool: int = 1,
  pooling: Literal["avg", "max"] = "avg",
  largest: bool = True,
) -> KeepTop:
  """The rule that keeps the tokens with the largest answers to a question.

  Args:
    question: its answer is a number for each token, or one for each head and
      token, which is averaged over heads.
    pool: answers are pooled over so many neighbours first (odd); 1: they are
      not. Protected tokens count as zero there.
    pooling: see `tokjax.scores.pool`.
    largest: False keeps the smallest.
  """
  return KeepTop(
    bind(
      answer, question=question, pool=pool, pooling=pooling,
      sign=1 if largest else -1,
    )
  )  # fmt: skip
