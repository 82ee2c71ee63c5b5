"""What a foreign block cannot carry out is refused before the first one."""

import math

from tokjax import signals
from tokjax.reduce.reduction import INSIDE, Reduce
from tokjax.signals import Question
from tokjax.slots import Slots
from tokjax.tokens import Kind

CARRIES = ("reduce", "proportional")
MODEL = "a foreign encoder"


def check(
  slots: Slots,
  patches: int,
  kinds: tuple[Kind, ...],
  grid: tuple[int, ...] | None,
) -> None:
  """Raises ValueError with the recipe, what it needs and the way out."""
  if patches < 1:
    raise ValueError(
      f"kinds={kinds}: name as many tokens as there are, or more; patches have"
      " to follow them"
    )
  if grid is not None and math.prod(grid) != patches:
    raise ValueError(
      f"grid={grid}: has {math.prod(grid)} places, and {patches} tokens follow"
      " those of kinds="
    )
  slots.refuse_foreign(CARRIES, MODEL)
  for reduce in slots.reduce:
    for fault in _faults(reduce, (*kinds, Kind.PATCH)):
      raise ValueError(f"{slots.described(reduce)} {fault}")
  if slots.losses:
    raise ValueError(
      f"recipe {slots.name!r} trains with losses of its own, which {MODEL} does"
      " not carry out; it is for tokjax.models"
    )


def _faults(reduce: Reduce, kinds: tuple[Kind, ...]):
  """What of a reduction cannot be, each in words that follow its name."""
  if reduce.at in INSIDE:
    yield (
      f"acts inside attention (at={reduce.at!r}), which {MODEL} does not show;"
      " use a recipe that acts at 'input', 'mlp' or 'output', or tokjax.models"
    )
  for name in ("learned", "combine", "soft"):
    if getattr(reduce, name) is not None:
      yield f"has a trained part ({name}=); use tokjax.models for it"
  if reduce.back is not None:
    yield f"gives tokens back ({reduce.back}); use tokjax.models for it"
  if reduce.again or reduce.unmerged or reduce.position != "keep":
    yield "is for language models (again=, unmerged= or renumbering)"
  if Kind.PATCH not in reduce.free.kinds:
    free = [kind.name for kind in reduce.free.kinds]
    yield f"reduces {free}; {MODEL} has free tokens of the kind PATCH"
  for question in reduce.asks:
    of = getattr(question, "of", None)
    if isinstance(of, signals.By):
      yield "weights queries by a signal, which only decoders answer"
    if asked := signals.unanswered(question, kinds):
      yield (
        f"asks for the attention of {asked} tokens; kinds="
        f" names {[kind.name for kind in kinds[:-1]]} in front"
      )
    now = question.layer == 0 and reduce.at == "input"
    told = (*signals.OF_THE_CALL, *signals.OF_TOKENS)
    if now and not isinstance(question, told):
      yield (
        f"asks {type(question).__name__} of the block ahead of it, which a"
        " foreign block answers behind its attention; use at='mlp' or layer=-1"
      )


def needed(question: Question, mapped: bool) -> tuple[str, ...]:
  """Arguments of `attended` from which a question is answered."""
  match question:
    case signals.Queries():
      return ("q",)
    case signals.Keys():
      return ("k",)
    case signals.Values():
      return ("v",)
    case signals.Rows(form="logits"):
      return ("q", "k")
    case signals.Rows() | signals.Received() | signals.Attention():
      return ("attention",) if mapped else ("q", "k")
  return ()
