"""Compiled programs, of which equal ones are compiled once."""

import dataclasses
import hashlib
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Shapes of the arrays in a pytree whose classes hold arrays only.

  Attributes:
    leaves: `jax.ShapeDtypeStruct` of each.
    tree: what they belong to.
  """

  leaves: Sequence[Any]
  tree: Any

  @classmethod
  def of(cls, tree: Any) -> "Shapes":
    """Of a tree of arrays, or of such shapes."""
    leaves, tree = jax.tree.flatten(tree)
    return cls([jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves], tree)

  @property
  def parts(self) -> list["Shapes"]:
    """Of the elements of a tuple."""
    found, begin = [], 0
    for tree in self.tree.children():
      end = begin + tree.num_leaves
      found.append(Shapes(self.leaves[begin:end], tree))
      begin = end
    return found


@dataclasses.dataclass(frozen=True)
class Executable:
  """A compiled program.

  Attributes:
    key: equal for equal programs.
    run: from leaves to leaves.
  """

  key: str
  run: Any


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled function of pytrees.

  Attributes:
    program: from leaves to leaves.
    out: shapes of what comes out.
  """

  program: Executable
  out: Shapes

  def __call__(self, *args: Any) -> Any:
    return self.out.tree.unflatten(self.program.run(jax.tree.leaves(args)))


class Compiler:
  """Compiles functions; those that lower to the same program share it.

  Recipes often differ in what they keep of a prompt and not in how they decode,
  and layers in their number only. Tracing is done each time, compiling once, as
  long as a program is in use. Safe to call in several threads.
  """

  def __init__(self) -> None:
    self._made: weakref.WeakValueDictionary[str, Executable] = (
      weakref.WeakValueDictionary()
    )
    self._locks: dict[str, threading.Lock] = {}
    self._lock = threading.Lock()

  def __call__(self, fn: Callable[..., Any], *given: Shapes) -> Compiled:
    """`fn` compiled for arguments of these shapes."""
    trees: list[Any] = []

    # Leaves in and out, as programs that differ in classes only are the same.
    def flat(leaves):
      left = iter(leaves)
      args = [
        shapes.tree.unflatten([next(left) for _ in shapes.leaves])
        for shapes in given
      ]
      out, tree = jax.tree.flatten(fn(*args))
      trees.append(tree)
      return out

    leaves = [x for shapes in given for x in shapes.leaves]
    # Equal programs take equal arguments, whatever they read of them.
    lowered = jax.jit(flat, keep_unused=True).lower(leaves)
    text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    with self._lock:
      lock = self._locks.setdefault(text, threading.Lock())
    with lock:
      program = self._made.get(text)
      if program is None:
        program = self._made[text] = Executable(text, lowered.compile())
    shapes = Shapes.of(lowered.out_info)
    return Compiled(program, Shapes(shapes.leaves, trees[-1]))
