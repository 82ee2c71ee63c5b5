"""The compiled forward pass of an encoder with a recipe."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.sweeps.subject import Job, Unfit
from tokjax.analysis import cost


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled forward pass.

  Attributes:
    job: what was compiled.
    run: `run(params, images, key)`: what the sweep compares.
    tokens: see `tokens_per_block`.
    cost: of a batch, selection included, by the compiler's own analysis.
  """

  job: Job
  run: Any
  tokens: tuple[int, ...]
  cost: cost.Cost

  def calls(self, params: Any, images: jax.Array) -> dict[str, Any]:
    """What is timed."""
    key = jax.random.key(0)
    return {"forward": lambda: self.run(params, images, key)}


def compile_forward(
  source: Any,
  job: Job,
  params: Any,
  images: jax.Array,
  of: Callable[[jax.Array], jax.Array] = lambda found: found,
) -> Program:
  """Builds a model with a recipe and compiles it for one batch.

  Args:
    source: `build(slots)` gives the model.
    job: the recipe.
    params: the weights.
    images: a batch of the shape to compile for.
    of: from the model's output to what is compared.

  Raises:
    Unfit: the model cannot be built with the recipe.
  """
  try:
    model = source.build(job.slots())
  except ValueError as error:
    raise Unfit(job, str(error)) from error
  tokens = []

  @jax.jit
  def forward(params, images, key):
    found, out = model.apply({"params": params}, images, key=key)
    tokens[:] = tokens_per_block(out)  # static, known once this is traced
    return of(found)

  arguments = (params, images, jax.random.key(0))
  compiled = forward.lower(*arguments).compile()
  spent = cost.measure(forward, *arguments, compiled=compiled)
  return Program(job, compiled, tuple(tokens), spent)


def tokens_per_block(out: Mapping[str, Any]) -> tuple[int, ...]:
  """Tokens that each block computes on at its end, protected ones included.

  Where a method gives its tokens back within the block, those in between.

  Args:
    out: what the model returned with its logits: "plans" of every block, and
      "tokens" after the last.
  """
  every = [plan for plans in out["plans"] for plan in plans]
  if not every:
    return (out["tokens"].x.shape[1],) * len(out["plans"])
  # What reaches the next plan shows whether the last one was undone.
  reach = [plan.num_sources for plan in every] + [every[-1].num_outputs]
  counts, passed = [], 0
  for plans in out["plans"]:
    passed += len(plans)
    counts.append(min([p.num_outputs for p in plans] or [reach[passed]]))
  return tuple(counts)
