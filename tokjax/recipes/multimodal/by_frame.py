"""Frames of a video share out what remains: each its part, or the best of all.

Frames are images of one prompt, in their order. A recipe of a tower acts on
each image by itself, so that every frame keeps as much; one of the language
model chooses among the visual tokens of the whole prompt. `by_frame` turns the
latter from one to the other.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import selection, signals
from tokjax.budgets import check_keep
from tokjax.recipes.multimodal.parts import Parts, quotas
from tokjax.reduce.rules import KeepTop
from tokjax.reduce.site import Site
from tokjax.signals import Origin
from tokjax.slots import Slots
from tokjax.tokens import Kind


@dataclasses.dataclass(frozen=True)
class OfFrames:
  """A score by which every frame keeps a part of its share, at least.

  The share of a frame is the budget times its part of the visual tokens. The
  best tokens of each frame come first, as many as `even` times its share, then
  the best of all others.

  Attributes:
    score: `Site -> [f]`.
    even: the part that is kept frame by frame, in (0, 1].
  """

  score: Any
  even: float

  @property
  def asks(self) -> tuple[Any, ...]:
    own = signals.questions_of(self.score)
    return own if Origin() in own else (*own, Origin())

  def __call__(self, site: Site) -> Float[Array, "f"]:
    score, n = self.score(site).astype(jnp.float32), site.num_free
    frame = Parts.of(site).image
    due = site.keep if site.due is None else site.due
    share, _ = quotas(frame, due)
    # As Python rounds, for every share that can be.
    table = [int(self.even * i + 1e-9) for i in range(site.keep + 1)]
    sure = jnp.asarray(table)[jnp.clip(share, 0, site.keep)]
    safe = jnp.where(jnp.isfinite(score), score, -jnp.inf)
    first = (frame < n) & (selection.places_within(safe, frame) < sure)
    ranked = -selection.places(safe).astype(jnp.float32)
    ranked = ranked + jnp.where(first, float(n), 0.0)
    return jnp.where(score > -jnp.inf, ranked, -jnp.inf)


def by_frame(slots: Slots, even: float = 1.0) -> Slots:
  """The slots with a budget that frames share out.

  Args:
    slots: of a recipe that keeps the best visual tokens in the language model.
    even: the part of each frame's share that is its own; the rest goes to the
      best tokens of all frames. 1: all frames keep the same fraction; near 0:
      what a frame keeps follows from its tokens alone, as without this.

  Raises:
    ValueError: `even` out of range; nothing of the slots chooses by a score in
      the language model.
  """
  check_keep(even, "even")
  reduces, turned = [], 0
  for reduce in slots.reduce:
    if reduce.free.kinds == (Kind.VISUAL,) and isinstance(reduce.rule, KeepTop):
      rule = dataclasses.replace(
        reduce.rule, score=OfFrames(reduce.rule.score, even)
      )
      reduce, turned = dataclasses.replace(reduce, rule=rule), turned + 1
    reduces.append(reduce)
  if not turned:
    raise ValueError(
      f"recipe {slots.name!r} has no reduction that keeps the visual tokens"
      " with the best score in the language model: those of towers keep the"
      " same number of every frame already, and others choose among tokens by"
      " rules of their own"
    )
  return dataclasses.replace(slots, reduce=tuple(reduces))
