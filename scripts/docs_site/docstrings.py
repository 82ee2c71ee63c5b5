"""What is particular to the docstrings and annotations of tokjax."""

import ast
import re

SECTION = re.compile(r"^(Args|Attributes):$")
ENTRY = re.compile(r"^(\s+)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*)$")


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
