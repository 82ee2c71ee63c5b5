"""`Slots`: what a recipe returns, how the slots of a model are filled."""

import dataclasses
from typing import Any

from tokjax import budgets
from tokjax.reduce.back import RESTORE
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.stages import check
from tokjax.signals import Question
from tokjax.slots.protocols import Attend, Cache, EncoderAttend, Program

# Slots and options of `Slots`, and which models carry them out.
TAKEN_BY = {
  "reduce": "encoders and decoders",
  "attend": "encoders and decoders, each with methods of its own",
  "cache": "decoders",
  "program": "encoders",
  "proportional": "encoders",
  "pool_by_size": "encoders with a pooling head",
  "collect": "encoders and decoders",
  "adapter_rank": "encoders and decoders",
  "draft": "decoders",
  "pass_class": "the vision tower of a vision-language model",
  "towers": "vision-language models",
}


@dataclasses.dataclass(frozen=True)
class Slots:
  """What a recipe returns: how the slots of a model are filled.

  Attributes:
    reduce: reductions; a single one is made a tuple. Within a block they act
      in the order of places, at one place in this order.
    attend: how attention is computed; None: dense. An `EncoderAttend` or an
      `Attend`. With a method `with_keep` it is turned as budgets are.
    cache: what a decoder remembers, a `Cache`; None: everything. Turned by its
      method `with_keep`, if it has one.
    program: a `Program`.
    proportional: adds log(size) of every key to the attention logits.
    pool_by_size: global pooling weights tokens by size.
    collect: questions that every block answers, for losses and pictures.
    adapter_rank: of trainable low-rank updates of the query and value
      projections (LoRA), for recipes that leave the backbone frozen; 0: none.
    draft: a module that guesses tokens ahead of a decoder, for speculative
      decoding: `tokjax.learned.LatentDraft`.
    losses: what training adds to the task's loss; hashable functions with
      `name` and `weight`, see `tokjax.losses`.
    pass_class: the class token of a vision tower goes on to the language model,
      as one more visual token.
    towers: slots of the parts of a larger model, by name, a dict or pairs; the
      fields above are then those of its language model. See `within`.
    name: the recipe's, for messages.
  """

  reduce: tuple[Reduce, ...] | Any = ()
  attend: Any = None
  cache: Any = None
  program: Any = None
  proportional: bool = False
  pool_by_size: bool = False
  losses: tuple[Any, ...] = ()
  collect: tuple[Question, ...] = ()
  adapter_rank: int = 0
  draft: Any = None
  pass_class: bool = False
  towers: tuple[tuple[str, "Slots"], ...] | Any = ()
  name: str = "slots"

  def __post_init__(self):
    if isinstance(self.reduce, Reduce):
      object.__setattr__(self, "reduce", (self.reduce,))
    self._check_towers()
    for name, kinds in (
      ("attend", (Attend, EncoderAttend)),
      ("cache", (Cache,)),
      ("program", (Program,)),
    ):
      value = getattr(self, name)
      if value is not None and not isinstance(value, kinds):
        raise ValueError(
          f"{name}={value!r}: must be a tokjax.slots.{kinds[0].__name__}"
        )
    hash(self)

  def _check_towers(self) -> None:
    towers = self.towers
    towers = tuple(towers.items() if isinstance(towers, dict) else towers)
    object.__setattr__(self, "towers", towers)
    names = [name for name, _ in towers]
    if len(set(names)) < len(names):
      raise ValueError(f"towers={names}: name each tower once")
    for name, slots in towers:
      if not isinstance(slots, Slots) or slots.towers:
        raise ValueError(
          f"towers: {name!r} has {slots!r}; must be Slots without towers of"
          " their own"
        )

  def within(self, tower: str) -> "Slots":
    """These slots as those of a part of a larger model.

    `recipes.get("tome").within("vision")` merges patches in the vision tower of
    a vision-language model.
    """
    return Slots(towers=((tower, self),), name=self.name)

  def tower(self, name: str) -> "Slots":
    """The slots of a part, empty ones if none are given for it."""
    return dict(self.towers).get(name, Slots(name=self.name))

  @property
  def outside_towers(self) -> "Slots":
    """The same slots without those of towers."""
    return dataclasses.replace(self, towers=())

  def named(self, name: str) -> "Slots":
    """With the name of a recipe, also in reductions and towers without one."""
    reduces = tuple(
      r if r.recipe else dataclasses.replace(r, recipe=name)
      for r in self.reduce
    )
    towers = tuple((tower, slots.named(name)) for tower, slots in self.towers)
    return dataclasses.replace(self, name=name, reduce=reduces, towers=towers)

  @property
  def follows_keep(self) -> bool:
    """Whether `with_keep` changes anything."""
    return self.with_keep(0.5) != self.with_keep(0.25)

  @property
  def reductions(self) -> int:
    """How many reductions share a budget, those of towers included.

    Others follow the encoder (unmerged ones) or their rule.
    """
    own = sum(r.shares_keep for r in self.reduce)
    return own + sum(s.reductions for _, s in self.towers)

  def restored(self) -> "Slots":
    """The same slots, every reduction of which gives back what it took.

    Behind the last block the grid of an encoder is full again, in its order: a
    token that was merged is a copy of the token that it went into, one that was
    dropped is as it was before that. Reductions that say themselves how tokens
    come back are not changed.
    """
    reduces = tuple(
      r if r.back else dataclasses.replace(r, back=RESTORE) for r in self.reduce
    )
    return dataclasses.replace(self, reduce=reduces)

  def with_keep(self, keep: float) -> "Slots":
    """The same slots turned so that about this fraction of tokens remains.

    Several reductions share it: the k of them leave keep^(1/k), keep^(2/k),
    ... of the initial tokens, so that `keep` holds for the whole. A tower with
    j of all k reductions leaves keep^(j/k) of the tokens that it is given. The
    other slots are turned by `keep` itself.
    """
    budgets.check_keep(keep)
    if self.towers:
      return self._with_shared(keep)
    turned = {}
    for name in ("attend", "cache", "program"):
      slot = getattr(self, name)
      turn = getattr(slot, "with_keep", None)
      turned[name] = slot if turn is None else turn(keep)
    reduces, number = [], 0
    for r in self.reduce:
      budget = r.budget.with_keep(keep)
      if r.shares_keep and self.reductions > 1:
        number += 1
        parts = 1 if budget.of == "arriving" else number
        budget = budget.with_keep(keep ** (parts / self.reductions))
      reduces.append(dataclasses.replace(r, budget=budget))
    return dataclasses.replace(self, reduce=tuple(reduces), **turned)

  def _with_shared(self, keep: float) -> "Slots":
    """`with_keep`, shared out among the towers and what is outside them."""

    def turned(slots: "Slots") -> "Slots":
      share = keep ** (slots.reductions / max(self.reductions, 1))
      only = Slots(reduce=slots.reduce).with_keep(share)
      rest = dataclasses.replace(slots, reduce=()).with_keep(keep)
      return dataclasses.replace(rest, reduce=only.reduce)

    towers = tuple((name, turned(slots)) for name, slots in self.towers)
    return dataclasses.replace(turned(self.outside_towers), towers=towers)

  @property
  def complete(self) -> bool:
    """Whether it works only where every token of the input is real."""
    learned = [self.attend, *(r.learned for r in self.reduce)]
    return any(r.gridded for r in self.reduce) or any(
      getattr(module, "complete", False) for module in learned
    )

  @property
  def needs_key(self) -> bool:
    inside = any(slots.needs_key for _, slots in self.towers)
    return inside or any(r.random for r in self.reduce)

  def counts(self, tokens: int, depth: int) -> tuple[budgets.Counts, ...]:
    """Checked counts of every reduction, each as if it were alone."""
    return tuple(
      check(
        r.budget.counts(tokens, depth), tokens, recipe=self.name,
        at_most=r.at_most,
      )
      for r in self.reduce
    )  # fmt: skip

  def filled(self) -> tuple[str, ...]:
    """Names of the slots and options that are not at their defaults."""
    empty = Slots()
    return tuple(
      name for name in TAKEN_BY if getattr(self, name) != getattr(empty, name)
    )

  def described(self, reduce: Reduce) -> str:
    """One of the reductions, for messages."""
    rule = reduce.recipe or "a rule"
    return f"recipe {self.name!r}, slot 'reduce': {rule}"

  def refuse_foreign(self, carries: tuple[str, ...], model: str) -> None:
    """Raises where a model does not carry out what is filled.

    Args:
      carries: slots and options that the model carries out.
      model: what it is, for the message: "a vision encoder".
    """
    for name in self.filled():
      if name not in carries:
        raise ValueError(
          f"recipe {self.name!r} fills {name!r}, which {model} does not carry"
          f" out; it is for {TAKEN_BY[name]}"
        )
