"""`Reduce`: a rule says which tokens become one, a plan moves them.

A rule is a pure function of a `Site`, which shows the free tokens of one
example, to a `Plan` over them. `Reduce` says where in a model the rule acts,
how many tokens remain and which are free. All of it is frozen and hashable, so
that equal recipes share a compilation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array

from tokjax import signals
from tokjax.budgets import Budget
from tokjax.plan import Plan
from tokjax.reduce.back import Back
from tokjax.reduce.free import Free
from tokjax.reduce.site import Site
from tokjax.signals import Question

At = Literal["input", "queries", "attention", "mlp", "output"]
AT: dict[str, str] = {
  "input": "on a block's input",
  "queries": "on the query rows of attention; keys and values stay",
  "attention": "on the block's input and on the attention map computed from it"
  " before the reduction; values are those of the reduced tokens. With"
  " back=Back('sublayer'): reduce, attend, give back, add to the residual",
  "mlp": "between attention (residual added) and MLP",
  "output": "on a block's output",
}
INSIDE = ("queries", "attention")


class Carried(NamedTuple):
  """What a rule returns that remembers something until its next site.

  Attributes:
    plan: over the free tokens.
    carry: a pytree; the rule's next site shows it as `site.carry`, which is
      None at the first one.
  """

  plan: Plan
  carry: Any


@runtime_checkable
class Rule(Protocol):
  """`Site -> Plan`; its questions are in the attribute `asks`, if any."""

  def __call__(self, site: Site) -> Plan | Carried: ...


@dataclasses.dataclass(frozen=True)
class Reduce:
  """A rule, how many tokens it leaves, and where in the model it acts.

  Attributes:
    rule: `Site -> Plan` over the site's free tokens; a module-level function
      or `bind(function, **options)`, so that equal ones compare equal. It
      carries its questions, see `tokjax.signals`.
    budget: how many free tokens remain after each block.
    at: one of `AT`.
    free: which tokens the rule may touch.
    back: whether and how the tokens are given back; None: they are not.
    position: "keep": tokens keep their positions; "renumber": those that
      remain are counted anew from 0 (in a language model; decoding goes on
      from there in the blocks above).
    again: in a language model, what remains is a prompt of its own: its ids
      are run through the whole model once more.
    at_most: largest fraction of tokens that one step can remove.
    rest: "drop", or "mean": what a rule drops becomes one more output, the
      mean of it by size.
    soft: the form in which the method trains, `Site -> [f]` keep bits in
      [0, 1] with a gradient: no token is removed, its policy is multiplied.
    learned: an unbound Linen module, called as `module(tokens, answers,
      stage)` on the batch; the rule reads its result as `site.learned`.
      Its method `modulate(tokens, plan, stage)`, if any, changes the features
      that the plan moves.
    unmerged: in a language model, the attention of every block sees the tokens
      as they were before this reduction, each with the query, key and value of
      the output that it went into, and outputs are means over their members;
      all else is computed once for each output, and caches hold every token.
    combine: an unbound Linen module for outputs that are no weighted sums of
      inputs (resamplers), called as `module(tokens, plan, stage)` on the
      batch; it returns the features of the plan's outputs, `[b, m, d]`.
    recipe: its name, for messages.
  """

  rule: Callable[[Site], Any]
  budget: Budget
  at: At = "input"
  free: Free = Free()
  back: Back | None = None
  position: Literal["keep", "renumber"] = "keep"
  again: bool = False
  at_most: float = 1.0
  rest: Literal["drop", "mean"] = "drop"
  soft: Callable[[Site], Array] | None = None
  learned: Any = None
  combine: Any = None
  unmerged: bool = False
  recipe: str = ""

  def __post_init__(self):
    if self.at not in AT:
      raise ValueError(f"at={self.at!r}: must be one of {sorted(AT)}")
    if not isinstance(self.budget, Budget):
      raise ValueError(
        f"budget={self.budget!r}: must be a Budget; see tokjax.budgets"
      )
    for name, allowed in (
      ("position", ("keep", "renumber")),
      ("rest", ("drop", "mean")),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f"{name}={getattr(self, name)!r}: must be one of {allowed}"
        )
    sublayer = self.back is not None and self.back.until == "sublayer"
    if sublayer and self.at != "attention":
      raise ValueError(
        f"back={self.back}: only a reduction at 'attention' is given back"
        f" behind a sub-layer; this one is at {self.at!r}"
      )
    hash(self)

  @property
  def asks(self) -> tuple[Question, ...]:
    """Questions of the rule and of its soft form."""
    own = signals.questions_of(self.rule)
    more = signals.questions_of(self.soft)
    return (*own, *(q for q in more if q not in own))

  @property
  def shares_keep(self) -> bool:
    """Whether reductions share a keep ratio with it; others none turns."""
    return self.budget.shared and not self.unmerged

  @property
  def random(self) -> bool:
    asked = signals.questions_of(self.rule)
    return any(isinstance(q, signals.Random) for q in asked)

  @property
  def gridded(self) -> bool:
    """Whether it works on a complete grid only."""
    return any(isinstance(q, signals.Grid) for q in self.asks)

  @property
  def around(self) -> bool:
    """Whether tokens are given back within the block."""
    return self.back is not None and self.back.until == "sublayer"
