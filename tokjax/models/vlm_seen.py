"""What rules in a language model ask about images, and the answers.

An encoder answers while it sees the images; its answers go with the visual
tokens through the blocks of the language model.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tokjax import signals
from tokjax.models.native_patches import NativeResolutionConfig
from tokjax.models.vlm_tower import ANSWERS
from tokjax.plan import Plan
from tokjax.signals import Answers, Question, Seen
from tokjax.slots import Slots
from tokjax.tokens import Kind

# What travels with one token each.
ASKED = tuple(q for q in ANSWERS if q is not signals.Attention)


def asked(slots: Slots) -> tuple[Question, ...]:
  """Questions that are answered before the language model runs."""
  every = [q for reduce in slots.reduce for q in reduce.asks]
  told = (*signals.OF_IMAGES, signals.Recalled)
  found = [q for q in every if isinstance(q, told)]
  return tuple(dict.fromkeys(q.answered(0) for q in found))


def asks_origin(slots: Slots) -> bool:
  """Whether a rule asks where visual tokens come from."""
  return any(isinstance(q, signals.Origin) for q in asked(slots))


def of_tower(question: Question, depth: int) -> Question:
  """A question of a tower of so many blocks, with its absolute block."""
  return question.answered(question.at(depth - 1, depth))


def collected(slots: Slots, depth: int) -> tuple[Question, ...]:
  """What the encoder answers for the language model."""
  seen = [q for q in asked(slots) if isinstance(q, Seen) and not q.ahead]
  return tuple(dict.fromkeys(of_tower(q.question, depth) for q in seen))


def check(config: Any, slots: Slots) -> None:
  """Raises ValueError for questions that the towers cannot answer.

  Args:
    config: a `VisionLanguageConfig`.
    slots: of the whole model.
  """
  where = f"recipe {slots.name!r}, slot 'reduce': asks about images"
  reduced = [name for name, own in slots.towers if own.reduce]
  found = asked(slots)
  recalls = any(isinstance(q, signals.Recalled) for q in found)
  if recalls and reduced:
    raise ValueError(
      f"{where} what earlier prompts said of each visual token, and the tower"
      f" {reduced[0]!r} leaves other ones each time; use one of the two recipes"
    )
  found = [q for q in found if not isinstance(q, signals.Recalled)]
  if not found:
    return
  native = isinstance(config.vision, NativeResolutionConfig)
  mixed = config.most_crops is not None
  if native or config.merge > 1 or config.tiled or mixed:
    raise ValueError(
      f"{where} patch by patch, and this model merges patches of the encoder,"
      " mixes those of large images or cuts images into tiles; use a recipe"
      " that does not ask the encoder"
    )
  kinds, depth = {*config.vision.kinds, Kind.PATCH}, config.vision.depth
  if any(isinstance(q, signals.Merged) for q in found):
    _check_merged(slots)
  passed = config.pass_class or any(own.pass_class for _, own in slots.towers)
  for question in found:
    if isinstance(question, signals.Merged):
      continue
    ahead = isinstance(question, Seen) and question.ahead
    # The block ahead is asked about the features that come to it.
    between = [name for name in reduced if not ahead or name != "vision"]
    if between or passed:
      what = f"the tower {between[0]!r} reduces them" if between else (
        "the class token goes on with them"
      )
      raise ValueError(
        f"{where} patch by patch, and {what}; use one of the two recipes"
      )
    if not isinstance(question, Seen):
      continue
    if lacking := signals.unanswered(question.question, kinds):
      raise ValueError(
        f"{where}, the attention of {lacking} tokens, which this encoder does"
        " not have; use a recipe that does without one"
      )
    if question.ahead and not config.ahead:
      raise ValueError(
        f"{where}, the block ahead of the features, which leave this encoder"
        " behind its last block; use a recipe that asks the encoder"
      )
    answers = ANSWERS if question.by else ASKED
    if not isinstance(question.question, answers):
      raise ValueError(
        f"{where}, {type(question.question).__name__}; an encoder answers"
        f" {', '.join(q.__name__ for q in answers)}"
      )
    at = 0 if question.ahead else question.question.at(depth - 1, depth)
    if not 0 <= at < depth:
      raise ValueError(
        f"{where}, block {at} of an encoder of {depth} blocks; ask another one"
      )


def _check_merged(slots: Slots) -> None:
  """Raises ValueError where it is unknown what the encoder made one."""
  for name, own in slots.towers:
    for reduce in own.reduce:
      if name != "vision" or reduce.back is None or reduce.back.until != "end":
        raise ValueError(
          f"{own.described(reduce)}, tower {name!r}: removes visual tokens, and"
          f" recipe {slots.name!r} asks which of all of them the encoder made"
          " one; use one of the two"
        )


def merged(plans: Iterable[Plan], front: int, images: int, n: int) -> Array:
  """The answer to `Merged`: numbers of outputs, others in each image, `[k, n]`.

  Args:
    plans: of the encoder, of a batch of images, in order.
    front: tokens ahead of those that go on.
    images: in the batch.
    n: tokens of an image, those ahead included.
  """
  index = jnp.broadcast_to(jnp.arange(n), (images, n))
  for plan in plans:
    # What is dropped has the number behind the last output.
    of = jax.vmap(lambda plan: jnp.append(plan.index, plan.num_outputs))(plan)
    index = jnp.take_along_axis(of, index, axis=1)
  return (index + n * jnp.arange(images)[:, None])[:, front:]


def of_patches(question: Seen, value: Array, front: int) -> Array:
  """An answer about images as numbers of their patches, `[k, n]`.

  Args:
    question: in the language model.
    value: the encoder's answer, of the batch of images.
    front: tokens ahead of the patches.
  """
  if question.by is not None:
    value = jax.vmap(question.by)(value)
  elif value.ndim == 3:
    value = value.mean(axis=1)
  return value[:, front:].astype(jnp.float32)


def spread(
  value: Array, kind: Array, place: Array, other: float | int = 0.0
) -> Array:
  """Numbers of patches at the places of their visual tokens, `[b, n]`."""
  return jnp.where(kind == Kind.VISUAL, value.reshape(-1)[place], other)


def without_images(slots: Slots, shape: tuple[int, int]) -> Answers:
  """The answers for prompts without images."""
  known = Answers()
  for question in asked(slots):
    value = jnp.zeros(shape, jnp.float32)
    if isinstance(question, signals.Merged):
      value = jnp.full(shape, -1, jnp.int32)
    elif isinstance(question, signals.Origin):
      value = jnp.full((*shape, len(signals.Origins._fields)), -1, jnp.int32)
    known = known.add(question, value)
  return known

