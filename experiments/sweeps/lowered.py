"""Shapes of arguments, and keys that tell which programs are equal."""

import dataclasses
import hashlib
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


def joined(parts: Sequence[Shapes]) -> Shapes:
  """Shapes of a tuple of these."""
  leaves = [x for part in parts for x in part.leaves]
  tree = jax.tree_util.treedef_tuple([part.tree for part in parts])
  return Shapes(leaves, tree)


def key_of(fn: Callable[..., Any], *given: Shapes) -> tuple[str, Shapes]:
  """A key that equal programs share, and the shapes of what comes out.

  Nothing is compiled. Recipes often differ in what they keep of a prompt and
  not in how they decode.
  """
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
  program = jax.jit(flat, keep_unused=True).lower(leaves)
  key = hashlib.sha256(program.as_text().encode()).hexdigest()
  return key, Shapes(Shapes.of(program.out_info).leaves, trees[-1])
