"""The `reduce` slot: a rule says which tokens become one, a plan moves them.

A rule is a pure function of a `Site`, which shows the free tokens of one
example, to a `Plan` over them. `Reduce` says where in a model the rule acts,
how many tokens remain and which signals it reads; `Slots` is what a recipe
returns and a model is built with. All of them are frozen and hashable, so that
equal recipes share a compilation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Array

from tokjax import schedules
from tokjax.plan import Plan
from tokjax.reduce.site import Site
from tokjax.schedules import Schedule
from tokjax.tokens import Signals

Where = Literal[
  "before_block", "attention_rows", "attention_map", "after_attention",
  "around_attention",
]  # fmt: skip
WHERE: dict[str, str] = {
  "before_block": "on a block's input; attention signals are those of the block"
  " before",
  "attention_rows": "on the query rows of attention; keys and values stay",
  "attention_map": "on the block's input and on the attention computed from it"
  " before the reduction; values are those of the reduced tokens",
  "after_attention": "between attention (residual added) and MLP",
  "around_attention": "around attention: reduce, attend, restore, residual",
}
ATTENTION = ("attention", "class_attention", "received_attention")
EXTRAS = ("key", "grid")


@dataclasses.dataclass(frozen=True)
class Bound:
  """A function with options bound: `functools.partial` that compares equal."""

  function: Callable[..., Any]
  options: tuple[tuple[str, Any], ...]

  def __call__(self, *args, **kwargs):
    return self.function(*args, **dict(self.options), **kwargs)


def bind(function: Callable[..., Any], **options) -> Bound:
  """Binds options to a rule; they must be hashable."""
  bound = Bound(function, tuple(sorted(options.items())))
  hash(bound)
  return bound


@dataclasses.dataclass(frozen=True)
class Reduce:
  """A rule, how many tokens it leaves, and where in the model it acts.

  Attributes:
    rule: `Site -> Plan` over the site's free tokens; a module-level function
      or `bind(function, **options)`, so that equal ones compare equal.
    schedule: how many free tokens remain after each block.
    at: one of `WHERE`.
    needs: names of `Signals` the rule reads, "key" if it is random, "grid" if
      it works on a complete grid of tokens.
    at_most: largest fraction of tokens that one step can remove.
    restore: after the last block every original token is given back (dense
      prediction); otherwise the reduced tokens are the output.
    soft: the form in which the method trains, `Site -> [f]` keep bits in
      [0, 1] with a gradient: no token is removed, its policy is multiplied.
    learned: an unbound Linen module, called as `module(tokens, signals,
      stage)` on the batch; the rule reads its result as `signals.learned`.
      Its method `modulate(tokens, plan, stage)`, if any, changes the features
      that the plan moves.
  """

  rule: Callable[[Site], Plan]
  schedule: Schedule
  at: Where = "after_attention"
  needs: tuple[str, ...] = ()
  at_most: float = 1.0
  restore: bool = False
  soft: Callable[[Site], Array] | None = None
  learned: Any = None

  def __post_init__(self):
    if self.at not in WHERE:
      raise ValueError(f"at={self.at!r}: must be one of {sorted(WHERE)}")
    known = Signals.names() + EXTRAS
    unknown = [name for name in self.needs if name not in known]
    if unknown:
      raise ValueError(
        f"needs={self.needs}: unknown signals {unknown}; known are {known}"
      )
    if not isinstance(self.schedule, Schedule):
      raise ValueError(
        f"schedule={self.schedule!r}: must have `counts` and `with_keep`; see"
        " tokjax.schedules"
      )
    hash(self)


@dataclasses.dataclass(frozen=True)
class Slots:
  """What a recipe returns: how the slots of a model are filled.

  Attributes:
    reduce: reductions, in the order in which they act within a block; a single
      one is made a tuple.
    attend: how attention is computed; None: dense. See `tokjax.attention`.
      With a method `with_keep` it is turned as schedules are. A module that
      says `complete = True` takes no padded input.
    cache: what a decoder remembers, see `tokjax.cache.contract.Cache`; None:
      everything. Turned by its method `with_keep`, if it has one.
    prompt: shortens a decoder's prompt within prefill, see
      `tokjax.cache.contract.PromptSelect`.
    program: wraps the whole call, `program(forward, images, patch_size)`; for
      the rare method that is no plan.
    proportional: adds log(size) of every key to the attention logits.
    pool_by_size: global pooling weights tokens by size.
    collect: signals that every block hands out, for losses and pictures.
    adapter_rank: of trainable low-rank updates of the query and value
      projections (LoRA), for recipes that leave the backbone frozen; 0: none.
    losses: what training adds to the task's loss; hashable functions with
      `name` and `weight`, see `experiments.tasks.auxiliary`.
    name: the recipe's, for messages.
  """

  reduce: tuple[Reduce, ...] | Any = ()
  attend: Any = None
  cache: Any = None
  prompt: Any = None
  program: Any = None
  proportional: bool = False
  pool_by_size: bool = False
  losses: tuple[Any, ...] = ()
  collect: tuple[str, ...] = ()
  adapter_rank: int = 0
  name: str = "slots"

  def __post_init__(self):
    if isinstance(self.reduce, Reduce):
      object.__setattr__(self, "reduce", (self.reduce,))
    hash(self)

  def with_keep(self, keep: float) -> "Slots":
    """The same slots with every schedule turned to `keep`."""
    schedules.check_keep(keep)
    program = self.program and self.program.with_keep(keep)
    turned = {}
    for name in ("attend", "cache", "prompt"):
      slot = getattr(self, name)
      turn = getattr(slot, "with_keep", None)
      turned[name] = slot if turn is None else turn(keep)
    return dataclasses.replace(
      self,
      program=program,
      **turned,
      reduce=tuple(
        dataclasses.replace(r, schedule=r.schedule.with_keep(keep))
        for r in self.reduce
      ),
    )

  @property
  def complete(self) -> bool:
    """Whether it works only where every token of the input is real."""
    learned = [self.attend, *(r.learned for r in self.reduce)]
    return any("grid" in r.needs for r in self.reduce) or any(
      getattr(module, "complete", False) for module in learned
    )

  @property
  def needs_key(self) -> bool:
    return any("key" in r.needs for r in self.reduce)

  def counts(self, tokens: int, depth: int) -> tuple[schedules.Counts, ...]:
    """Checked counts of every reduction. See `schedules.check`."""
    out = []
    for r in self.reduce:
      counts = r.schedule.counts(tokens, depth)
      out.append(
        schedules.check(counts, tokens, recipe=self.name, at_most=r.at_most)
      )
    return tuple(out)

  def check(
    self,
    *,
    tokens: int,
    depth: int,
    provides: tuple[str, ...],
    model: str,
  ) -> None:
    """Raises if a model cannot be built with these slots.

    Args:
      tokens: free tokens at the model's input.
      depth: number of blocks.
      provides: signals and extras the model can give.
      model: its name, for the message.
    """
    for r, counts in zip(self.reduce, self.counts(tokens, depth), strict=True):
      missing = [name for name in r.needs if name not in provides]
      if missing:
        raise ValueError(
          f"recipe {self.name!r} needs {missing} at {r.at!r}, which {model}"
          f" does not provide; it provides {sorted(provides)}"
        )
      acts = [i for i, after in enumerate(counts) if after is not None]
      if "grid" in r.needs and r.at != "around_attention" and len(acts) > 1:
        raise ValueError(
          f"recipe {self.name!r} works on a complete grid of tokens, which is"
          f" gone after block {acts[0]}, but is scheduled for blocks {acts};"
          " use a schedule that acts once, such as Once or Square"
        )
      if r.at == "before_block" and counts and counts[0] is not None:
        early = [name for name in r.needs if name in ATTENTION]
        early += [n for n in ("keys", "queries", "values") if n in r.needs]
        if early:
          raise ValueError(
            f"recipe {self.name!r} needs {early} before block 0, where no"
            " attention has been computed yet; schedule it for later blocks"
          )
