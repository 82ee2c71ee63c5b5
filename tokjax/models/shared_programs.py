"""One compiled program for all layers that rules treat alike.

Blocks of a deep model differ in their weights and in the number that they have.
A program that was traced for one of them serves another if the rules never
asked for that number, or would be told the same: `Watched` notes what they ask,
`Shared` compares. Tracing and compiling then take as long as there are kinds of
layers, not layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from tokjax.layer import Answer, Layer
from tokjax.models.products import Compiled


class Asked(NamedTuple):
  """What a rule wanted to know of the number of a layer, and was told."""

  rule: Callable[..., Any]
  args: tuple[Any, ...]
  answer: Any

  def holds(self, layer: Layer) -> bool:
    """Whether another layer would be told the same."""
    try:
      other = self.rule(*self.args, layer.index, layer.depth)
    except (IndexError, ValueError):  # What this layer is not allowed to be.
      return False
    if isinstance(other, np.ndarray):
      return np.array_equal(other, self.answer)
    return other == self.answer


class Watched(Layer):
  """A layer in a program that others may share; notes what it is asked.

  Attributes:
    asked: what rules asked of its number, in order.
  """

  asked: list[Asked]

  @classmethod
  def of(cls, layer: Layer, number: Int[Array, ""]) -> "Watched":
    """`number` is the layer's own, traced."""
    watched = object.__new__(cls)
    vars(watched).update(vars(layer), asked=[], traced=number)
    return watched

  __hash__ = object.__hash__
  __eq__ = object.__eq__

  @property
  def index(self) -> int:
    """Who reads it is told the number, and shares with no other layer."""
    return self.ask(_index)

  @index.setter
  def index(self, index: int) -> None:
    """For `dataclasses.replace`, which has read the number before."""
    vars(self).update(index=index, asked=[], traced=index)

  def replace(self, **changes: Any) -> Layer:
    """It notes what is asked of this one, too."""
    other = object.__new__(type(self))
    vars(other).update(vars(self), **changes)
    return other

  @property
  def key(self) -> int:
    return vars(self)["index"]

  @property
  def number(self) -> int | Int[Array, ""]:
    return vars(self)["traced"]

  def ask(self, rule: Callable[..., Answer], *args: Any) -> Answer:
    answer = rule(*args, self.key, self.depth)
    self.asked.append(Asked(rule, args, answer))
    return answer


def _index(index: int, depth: int) -> int:
  return index


class Program(NamedTuple):
  """A compiled function, and what it takes for granted."""

  call: Any
  asked: list[Asked]

  def serves(self, layer: Layer) -> bool:
    return all(question.holds(layer) for question in self.asked)


class Shared:
  """`run(layer, *args)`, compiled once for layers that it treats alike.

  Within another compilation it is part of that one; tracing is shared all the
  same.

  Attributes:
    run: the function; a pure function of its arguments.
    donate: numbers of the arguments whose buffers may be taken over.
    dtype: of its products, see `Compiled`.
  """

  def __init__(
    self,
    run: Callable[..., Any],
    donate: tuple[int, ...] = (),
    dtype: Any = jnp.float32,
  ):
    self.run, self.donate, self.dtype = run, donate, dtype
    self._programs: dict[Any, list[Program]] = {}

  def __call__(self, layer: Layer, *args: Any) -> Any:
    return self.program(layer, *args)(np.int32(layer.index), *args)

  def program(self, layer: Layer, *args: Any) -> Callable[..., Any]:
    """What to call with the layer's number and arguments of these shapes."""
    alike = dataclasses.replace(layer, index=0)
    programs = self._programs.setdefault((alike, shapes_of(args)), [])
    for program in programs:
      if program.serves(layer):
        return program.call
    asked: list[Asked] = []

    def traced(number, *args):
      watched = Watched.of(layer, number)
      out = self.run(watched, *args)
      asked.extend(watched.asked)
      return out

    donated = tuple(i + 1 for i in self.donate)
    call = Compiled(traced, self.dtype, donate_argnums=donated)
    number = np.int32(layer.index)
    call.of(*args).trace(number, *args)  # Notes what is asked.
    programs.append(Program(call, asked))
    return call

  def compiled(self) -> int:
    """How many programs were compiled."""
    every = (p for programs in self._programs.values() for p in programs)
    return sum(program.call.compiled() for program in every)


def shapes_of(tree: Any) -> Any:
  """What a compiled program depends on in its arguments; hashable."""
  leaves, structure = jax.tree.flatten(tree)
  return structure, tuple((x.shape, x.dtype) for x in leaves)
