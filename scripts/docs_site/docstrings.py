"""An extension of griffe: what is particular to the docstrings of tokjax.

Docstrings name arguments that go together on one line, "a, b: text"; each gets
an entry with its own type. Annotations say shapes, `Float[Array, "n"]`, which
griffe would read as the name of a class and print without its quotes.
"""

import ast
import re

import griffe

SECTION = re.compile(r"^(Args|Attributes):$")
ENTRY = re.compile(r"^(\s+)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*)$")


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


def written(annotation: ast.expr) -> str:
  """An annotation as in the source; one that is all quoted without quotes."""
  if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
    return annotation.value
  return re.sub(r"'([^']*)'", r'"\1"', ast.unparse(annotation))


def separated(text: str) -> str:
  """The docstring with a copy of an entry for each of its names."""
  out, inside, indent = [], False, ""
  lines = text.split("\n")
  at = 0
  while at < len(lines):
    line = lines[at]
    if SECTION.match(line):
      inside, indent = True, ""
    elif inside and line and not line.startswith(" "):
      inside = False
    found = ENTRY.match(line) if inside else None
    if inside and line.strip():
      indent = indent or line[: len(line) - len(line.lstrip())]
    if not found or found[1] != indent:
      out.append(line)
      at += 1
      continue
    end = at + 1
    while end < len(lines) and lines[end].startswith(indent + " "):
      end += 1
    for name in found[2].split(", "):
      out += [f"{indent}{name}: {found[3]}", *lines[at + 1 : end]]
    at = end
  return "\n".join(out)
