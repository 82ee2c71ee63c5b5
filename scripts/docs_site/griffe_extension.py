"""An extension of griffe: what is particular to the docstrings of tokjax.

Docstrings name arguments that go together on one line, "a, b: text"; each gets
an entry with its own type. Annotations say shapes, `Float[Array, "n"]`, which
griffe would read as the name of a class and print without its quotes.
"""

import ast

import griffe

from scripts.docs_site.docstrings import separated, written


class NamesAndShapes(griffe.Extension):
  """Gives every name of a line an entry; annotations stay as written."""

  def on_function_instance(
    self, *, node: ast.AST, func: griffe.Function, **kwargs
  ) -> None:
    """Annotations of arguments and results."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      return
    for argument in ast.walk(node.args):
      if isinstance(argument, ast.arg) and argument.annotation is not None:
        parameter = func.parameters[argument.arg]
        parameter.annotation = written(argument.annotation)
    if node.returns is not None:
      func.returns = written(node.returns)

  def on_attribute_instance(
    self, *, node: ast.AST, attr: griffe.Attribute, **kwargs
  ) -> None:
    """Annotations of fields and properties."""
    if isinstance(node, ast.AnnAssign):
      attr.annotation = written(node.annotation)
    elif isinstance(node, ast.FunctionDef) and node.returns is not None:
      attr.annotation = written(node.returns)

  def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
    """Rewrites the docstring of what was read."""
    if obj.docstring is not None:
      obj.docstring.value = separated(obj.docstring.value)
