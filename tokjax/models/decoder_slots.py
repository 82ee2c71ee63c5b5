"""What a decoder makes of its slots: refusals, stages, passages."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import signals
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.passage import Passage
from tokjax.models.reducer import Reducer
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.stages import Sequence, Stages, plan_stages
from tokjax.slots import Slots, for_decoder
from tokjax.tokens import Kind, Tokens

CARRIES = ("reduce", "attend", "cache", "collect", "adapter_rank", "draft")
PLACES = ("input", "mlp", "output")
Capacities = tuple[tuple[Kind, int], ...]


def check_slots(
  config: DecoderConfig, slots: Slots, images: bool = False
) -> None:
  """Raises ValueError for slots that a decoder cannot carry out.

  Args:
    config: of the decoder.
    slots: what it is built with.
    images: whether it is part of a vision-language model.
  """
  slots.refuse_foreign(CARRIES, "a decoder")
  if slots.attend is not None and not for_decoder(slots.attend):
    raise ValueError(
      f"recipe {slots.name!r} fills 'attend' for an encoder, with"
      f" {type(slots.attend).__name__}; a decoder takes attention that is a"
      " tokjax.slots.Attend, such as tokjax.attention.Causal"
    )
  if slots.draft is not None:
    _check_draft(config, slots)
  for reduce in slots.reduce:
    _check_reduce(config, slots, reduce, images)
  if slots.needs_key and slots.reduce:
    raise ValueError(
      f"recipe {slots.name!r} is random, and prompts are taken without a key;"
      " use a recipe that is not"
    )
  kinds = {kind for r in slots.reduce for kind in r.free.kinds}
  every = tuple((kind, config.length) for kind in Kind if kind in kinds)
  stages_of(slots, config, config.length, every, idle=False)


def _check_draft(config: DecoderConfig, slots: Slots) -> None:
  """Raises ValueError for a draft that cannot follow; see `check_slots`."""
  where = f"recipe {slots.name!r}, slot 'draft': {type(slots.draft).__name__}"
  if config.width % config.heads or config.width // config.heads % 2:
    raise ValueError(
      f"{where} has heads of width / heads features, and width="
      f"{config.width}, heads={config.heads} give no even number; use a model"
      " whose heads divide its width"
    )
  if any(reduce.unmerged or reduce.again for reduce in slots.reduce):
    raise ValueError(
      f"{where} reads the tokens of a prompt as they leave the last block, and"
      " another reduction shows them as copies, or begins anew; use one of the"
      " two"
    )


def _check_reduce(
  config: DecoderConfig, slots: Slots, reduce: Reduce, images: bool
) -> None:
  """Raises ValueError for one reduction; see `check_slots`."""
  where = slots.described(reduce)
  if reduce.at not in PLACES:
    raise ValueError(
      f"{where} acts at {reduce.at!r}, inside attention; a decoder carries"
      f" out reductions at {', '.join(PLACES)}"
    )
  if not set(reduce.free.kinds) & {Kind.TEXT, Kind.VISUAL}:
    raise ValueError(
      f"{where} reduces {[k.name for k in reduce.free.kinds]} tokens, and"
      " prompts hold TEXT and VISUAL ones; give the reduction"
      " free=Free((Kind.VISUAL,))"
    )
  if reduce.gridded:
    raise ValueError(
      f"{where} works on a complete grid of tokens, which a text does not"
      " have; use it in a vision encoder"
    )
  if reduce.soft is not None and slots.attend is not None:
    raise ValueError(
      f"{where} trains softly, for which keys are weighted in dense"
      f" attention, and 'attend' is {type(slots.attend).__name__}; use one of"
      " the two"
    )
  if reduce.back is not None and reduce.back.fill == "memory":
    raise ValueError(
      f"{where} fills from a memory, which a decoder does not keep; use"
      " another fill"
    )
  if getattr(reduce.learned, "complete", False):
    raise ValueError(
      f"{where} takes no padding, which prompts have; use it in a vision"
      " encoder"
    )
  if reduce.unmerged and (len(slots.reduce) > 1 or slots.collect):
    raise ValueError(
      f"{where} shows attention the tokens as they were before it, and"
      " another reduction or a signal that is collected would be of the"
      " outputs; use it as the only one"
    )
  if reduce.again and len(slots.reduce) > 1:
    raise ValueError(
      f"{where} starts again with what remains, which does not go together"
      " with another reduction; use one of the two"
    )
  if config.axes > 1 and reduce.again:
    raise ValueError(
      f"{where} makes a new prompt of what remains, and positions of this"
      f" model have {config.axes} axes, on which what remains of an image has"
      " no place in a text; use a reduction without again="
    )
  if not images and any(
    isinstance(q, signals.OF_IMAGES) for q in reduce.asks
  ):
    raise ValueError(
      f"{where} asks what an encoder says about visual tokens, and a decoder"
      " has none; build a tokjax.models.VisionLanguage with the recipe"
    )
  of_classes = [
    q for q in reduce.asks if getattr(q, "of", None) == signals.CLASS.of
  ]
  if of_classes:
    raise ValueError(
      f"{where} asks for the attention of CLASS tokens, which a decoder does"
      " not have"
    )


def stages_of(
  slots: Slots,
  config: DecoderConfig,
  tokens: int,
  capacities: Capacities,
  idle: bool = True,
) -> Stages:
  """The stages of prompts padded to `tokens`, with so many of each kind.

  `idle` as in `plan_stages`: short prompts may leave a reduction nothing to do.
  """
  sequence = Sequence(capacities, tokens)
  return plan_stages(
    slots.reduce, sequence, config.depth, recipe=slots.name, idle=idle
  )


def whole_sequence(slots: Slots, initialising: bool) -> Slots:
  """The slots as a call carries them out that takes a whole sequence at once.

  Raises:
    ValueError: a reduction that makes a new prompt of what remains; only its
      parameters can be made so.
  """
  if not any(reduce.again for reduce in slots.reduce):
    return slots
  if not initialising:
    raise ValueError(
      f"recipe {slots.name!r} makes a new prompt of what remains, which a"
      " whole sequence at once does not have; use tokjax.models.Generator"
    )
  once = tuple(dataclasses.replace(r, again=False) for r in slots.reduce)
  return dataclasses.replace(slots, reduce=once)


def kind_of_weights(
  slots: Slots, tokens: Int[Array, "b n"]
) -> Int[Array, "b n"] | None:
  """Kinds of tokens that parameters are made from, where none are given.

  Those that the reductions with weights act on; None: TEXT.
  """
  kinds = {
    kind
    for reduce in slots.reduce
    for kind in reduce.free.kinds
    if reduce.learned is not None or reduce.combine is not None
  }
  if not kinds or Kind.TEXT in kinds:
    return None
  return jnp.full(tokens.shape, min(kinds), jnp.int32)


def check_initialised(slots: Slots, stages: Stages) -> None:
  """Raises where a reduction with weights does not act, so has none."""
  acting = {stage.number for block in stages for stage in block}
  for number, reduce in enumerate(slots.reduce):
    weights = reduce.learned is not None or reduce.combine is not None
    if weights and number not in acting:
      kinds = ", ".join(kind.name for kind in reduce.free.kinds)
      raise ValueError(
        f"recipe {slots.name!r}: {reduce.recipe or 'a reduction'} has weights"
        " and nothing to remove from the tokens that the model is initialised"
        f" with; give more tokens of the kinds {kinds} (argument kind=)"
      )


def check_mask(mask: Array | None, tokens: Array) -> None:
  """Raises where a mask has not the shape of the tokens."""
  if mask is not None and mask.shape != tokens.shape:
    raise ValueError(
      f"mask: has shape {mask.shape}; must be that of the tokens,"
      f" {tokens.shape}"
    )


def capacities_of(rows) -> Capacities:
  """Without more knowledge every kind may fill the whole sequence."""
  n = rows.token.shape[1]
  if rows.kind is None:
    return ((Kind.TEXT, n),)
  return tuple((kind, n) for kind in Kind)


def start_passage(reducer: Reducer, rows) -> Passage:
  """Rows as they enter the first block."""
  b, n = rows.token.shape
  kind = rows.kind
  kind = jnp.full((b, n), Kind.TEXT, jnp.int32) if kind is None else kind
  position = rows.position[..., None]
  if rows.offset is not None:
    position = jnp.concatenate([position, position + rows.offset], axis=-1)
  position = position.astype(jnp.float32)
  size = jnp.ones((b, n), jnp.float32)
  tokens = Tokens(rows.x, size, position, kind, rows.valid)
  passage = reducer.start(tokens)
  zero = jnp.zeros((b,), jnp.int32)
  length = rows.valid.sum(axis=1, dtype=jnp.int32)
  return passage.replace(
    ids=rows.token, length=length, shift=zero, attended=zero,
    answers=rows.known,
  )  # fmt: skip


def split_position(
  position: Float[Array, "b n p"],
) -> tuple[Int[Array, "b n"], Int[Array, "b n a"] | None]:
  """What orders tokens, and offsets of the axes from it, if there are any.

  Args:
    position: of `Tokens` in a decoder: the place in the text, then coordinates.
  """
  position = position.astype(jnp.int32)
  place, coordinates = position[..., 0], position[..., 1:]
  if not coordinates.shape[-1]:
    return place, None
  return place, coordinates - place[..., None]


def put_back(
  passage: Passage, valid: Bool[Array, "b n"]
) -> tuple[Float[Array, "b n d"], Bool[Array, "b n"]]:
  """Hidden states at their places, zeros where tokens were removed."""
  x: Any = passage.tokens.x
  remains: Any = passage.tokens.mask
  for plan in passage.in_force[::-1]:
    x, remains = jax.vmap(_placed)(plan, x, remains)
  if not passage.in_force:
    remains = valid
  return x, remains


def _placed(plan, x, remains):
  n, at = plan.num_sources, plan.anchor
  at = at if plan.valid is None else jnp.where(plan.valid, at, n)
  full = jnp.zeros((n, x.shape[1]), x.dtype).at[at].set(x, mode="drop")
  return full, jnp.zeros((n,), bool).at[at].set(remains, mode="drop")


def kind_capacities(kinds: np.ndarray, bucket) -> Capacities:
  """Room for each kind in a batch: the most that an example has, in a bucket.

  Args:
    kinds: of real tokens, -1 for padding, `[b, n]`.
    bucket: from a length to the padded length.
  """
  found = []
  for kind in Kind:
    most = int((kinds == int(kind)).sum(axis=1).max())
    if most:
      found.append((kind, bucket(most)))
  return tuple(found)


def arriving(stages: Stages, layer: int, tokens: int) -> int:
  """Tokens that the attention of a block is given, of prompts of `tokens`."""
  away: list[tuple[int, int]] = []
  for at, block in enumerate(stages[: layer + 1]):
    back_now = [before for until, before in away if until <= at]
    away = [one for one in away if one[0] > at]
    tokens = back_now[0] if back_now else tokens
    for stage in block:
      back = stage.reduce.back
      if stage.reduce.unmerged or at == layer and stage.reduce.at != "input":
        continue
      if back is not None and isinstance(back.until, int):
        away.append((at + back.until, tokens))
      tokens = stage.outputs
  return tokens
