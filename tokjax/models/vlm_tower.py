"""Towers of a single block: what those of a vision-language model share."""

from collections.abc import Collection

from jaxtyping import Array, PRNGKeyArray

from tokjax import signals
from tokjax.models.passage import Passage
from tokjax.models.reducer import Reducer
from tokjax.reduce.stages import Sequence, Stages, plan_stages
from tokjax.signals import Question
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens

CARRIES = ("reduce",)
PLACES = ("input", "output")
# What a tower answers that can ask blocks of an encoder.
ANSWERS = (
  *signals.OF_TOKENS, signals.Rows, signals.Received, signals.Attention,
  signals.Queries, signals.Keys, signals.Values,
)  # fmt: skip


def stages_of(
  slots: Slots,
  patches: int,
  front: int,
  grid: tuple[int, ...] | None,
  idle: bool = False,
) -> Stages:
  """The reductions of a tower, for so many patches behind other tokens.

  `idle` as in `plan_stages`: small images may leave a reduction nothing to do.
  """
  sequence = Sequence(((Kind.PATCH, patches),), patches + front, front, grid)
  return plan_stages(slots.reduce, sequence, 1, recipe=slots.name, idle=idle)


def start(
  slots: Slots,
  tokens: Tokens,
  front: int,
  grid: tuple[int, ...] | None,
  key: PRNGKeyArray | None,
  idle: bool = False,
) -> tuple[Passage, Reducer]:
  """Tokens as they enter the block, and what reduces them.

  Args:
    slots: of the tower.
    tokens: `[k, n, d]`.
    front: so many at the head are no patches, and no reduction touches them.
    grid: sides of the grid that the patches form; None: none.
    key: for recipes that are random.
    idle: see `stages_of`.
  """
  stages = stages_of(slots, tokens.num_tokens - front, front, grid, idle)
  masked = tokens.mask is not None
  reducer = Reducer.create(
    slots, stages, len(tokens.x), masked=masked, ragged=masked, key=key
  )
  return reducer.start(tokens).replace(plans=((),)), reducer


def asked(slots: Slots) -> tuple[Question, ...]:
  """Questions that the reductions ask of the block."""
  every = [q for reduce in slots.reduce for q in reduce.asks]
  own = [q for q in every if not isinstance(q, signals.OF_THE_CALL)]
  return tuple(dict.fromkeys(q.answered(0) for q in own))


def of_tokens(question: Question, tokens: Tokens) -> Array:
  """The answer about the tokens at the input of the block."""
  if isinstance(question, signals.Derived):
    return question.of_batch(tokens)
  return tokens.x


def check_ragged(slots: Slots, what: str) -> None:
  """Raises ValueError for slots that take no images of different sizes."""
  for reduce in slots.reduce:
    complete = getattr(reduce.learned, "complete", False)
    if reduce.gridded or complete:
      raise ValueError(
        f"{slots.described(reduce)} works on a complete grid of tokens, and"
        f" {what} takes images of different sizes, whose grids are padded; use"
        " another recipe"
      )


def check_kinds(slots: Slots, kinds: Collection[Kind]) -> None:
  """Raises ValueError for questions about kinds of tokens that are not there.

  Args:
    slots: of the tower.
    kinds: of its tokens.
  """
  for reduce in slots.reduce:
    for question in reduce.asks:
      if asked := signals.unanswered(question, kinds):
        raise ValueError(
          f"{slots.described(reduce)} asks for the attention of"
          f" {asked} tokens, which this encoder"
          f" does not have; it has {sorted(kind.name for kind in kinds)}"
        )


def check_slots(
  slots: Slots,
  what: str,
  places: tuple[str, ...],
  answers: tuple[type[Question], ...],
) -> None:
  """Raises ValueError for slots that a tower cannot carry out.

  Args:
    slots: of the tower.
    what: it is, for messages.
    places: at which it carries out reductions.
    answers: questions that it answers.
  """
  slots.refuse_foreign(CARRIES, what)
  for reduce in slots.reduce:
    where = slots.described(reduce)
    if reduce.at not in places:
      raise ValueError(
        f"{where} acts at {reduce.at!r}; {what} carries out reductions at"
        f" {' and '.join(places)}"
      )
    odd = (reduce.back, reduce.again, reduce.soft, reduce.unmerged)
    if any(odd) or reduce.position != "keep":
      raise ValueError(
        f"{where} gives tokens back, renumbers, unmerges, starts again or"
        f" trains softly; {what} only reduces"
      )
    if Kind.PATCH not in reduce.free.kinds:
      raise ValueError(
        f"{where} reduces {[k.name for k in reduce.free.kinds]} tokens; {what}"
        " has free tokens of the kind PATCH"
      )
    for question in reduce.asks:
      if not isinstance(question, (*answers, *signals.OF_THE_CALL)):
        raise ValueError(
          f"{where} asks {type(question).__name__}, which {what} does not"
          " answer; use the recipe within the vision tower"
        )
