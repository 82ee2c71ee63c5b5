"""Giving back what a reduction took away: behind a sub-layer or blocks."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.plan import Plan

FILLS = ("copy", "last", "zero", "input", "memory")
JOINS = ("replace", "add")


@dataclasses.dataclass(frozen=True)
class Back:
  """Until when tokens are away, and what they come back with.

  Attributes:
    until: "sublayer" (given back behind the attention that ran on the few),
      "end" (behind the last block), or a number of blocks.
    fill: what tokens take that are no anchor of an output: a "copy" of the
      output they went into (zeros where they were dropped), the same but
      their "last" value where they were dropped, "zero", their value at the
      "input" of the reduction (also where they were merged), or a "memory"
      that the caller keeps from call to call (step caches).
    join: "replace": anchors take their outputs; "add": what comes back is
      added to the input of the reduction.
  """

  until: Literal["sublayer", "end"] | int = "end"
  fill: Literal["copy", "last", "zero", "input", "memory"] = "copy"
  join: Literal["replace", "add"] = "replace"

  def __post_init__(self):
    number = isinstance(self.until, int) and not isinstance(self.until, bool)
    if self.until not in ("sublayer", "end") and not (
      number and self.until >= 1
    ):
      raise ValueError(
        f"until={self.until!r}: must be 'sublayer', 'end' or a number of blocks"
        " from 1 on"
      )
    for name, allowed in (("fill", FILLS), ("join", JOINS)):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f"{name}={getattr(self, name)!r}: must be one of {allowed}"
        )
    if self.until == "sublayer" and self.fill in ("input", "last"):
      raise ValueError(
        f"fill={self.fill!r}: behind a sub-layer what comes back is added to"
        " the input already; fill='zero' leaves dropped tokens as they are"
      )


# Behind the last block: the whole grid, for dense heads.
RESTORE = Back("end", "last")


def given_back(
  plan: Plan,
  few: Float[Array, "m d"],
  back: Back,
  whole: Float[Array, "n d"] | None = None,
  memory: Float[Array, "n d"] | None = None,
) -> Float[Array, "n d"]:
  """All tokens of one example after a function ran on the few of a plan.

  Args:
    plan: from n tokens to m.
    few: what the function made of the m.
    back: how.
    whole: the tokens before the plan, for `fill="input"` or "last" and
      `join="add"`.
    memory: for `fill="memory"`.
  """
  if back.fill == "copy":
    full = plan.restore(few)
  elif back.fill == "last":
    assert whole is not None
    dropped, last = plan.dropped[:, None], whole.astype(few.dtype)
    full = jnp.where(dropped, last, plan.restore(few))
  else:
    n = plan.num_sources
    at = plan.anchor
    if plan.valid is not None:
      at = jnp.where(plan.valid, at, n)
    other = {"input": whole, "memory": memory}.get(back.fill)
    other = jnp.zeros((n, few.shape[1]), few.dtype) if other is None else other
    full = other.astype(few.dtype).at[at].set(few, mode="drop")
  return whole + full if back.join == "add" else full


def around(
  function: Callable[[Float[Array, "m d"]], Float[Array, "m d"]],
  plan: Plan,
  x: Float[Array, "n d"],
  back: Back = Back(),
  memory: Float[Array, "n d"] | None = None,
) -> Float[Array, "n d"]:
  """Reduce, `function`, give back: one primitive for every kind of bypass.

  ToMe for diffusion copies, mixture-of-depths passes the input on, step caches
  take a memory. One example; lift with `jax.vmap`.
  """
  return given_back(plan, function(plan.apply(x)), back, x, memory)
