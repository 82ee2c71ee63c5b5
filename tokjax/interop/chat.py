"""Chat templates: messages to the text that a model was tuned on.

A template is a Jinja program that comes with a checkpoint, so it runs in
Jinja's sandbox: it cannot reach attributes that lead out of it, nor change what
it is given. Options and functions are those that `transformers` gives templates
(5.24, utils/chat_template_utils.py).
"""

import dataclasses
import datetime
import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

NEEDS = "chat templates need the package jinja2: pip install 'tokjax[chat]'"
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Chat:
  """How a model was told of turns.

  Attributes:
    template: the program.
    tokens: texts of special tokens by name, such as ("bos_token", "<s>").
  """

  template: str
  tokens: tuple[tuple[str, str], ...] = ()

  def render(self, messages: Sequence[Message], *, answer: bool = True) -> str:
    """The text of a conversation.

    Args:
      messages: each with "role" and "content".
      answer: the text ends where the model's answer begins.

    Raises:
      ImportError: jinja2 is not installed.
      ValueError: the template is no Jinja, refuses these messages, or does what
        the sandbox does not allow.
    """
    jinja2 = library("jinja2")
    try:
      return compiled(self.template).render(
        messages=list(messages),
        add_generation_prompt=answer,
        **dict(self.tokens),
      )
    except jinja2.TemplateError as error:
      raise ValueError(f"chat template: {error.message}") from error
    except (ArithmeticError, LookupError, TypeError) as error:
      raise ValueError(
        f"chat template: {type(error).__name__}: {error}"
      ) from error


def library(name: str) -> Any:
  """A module of Jinja.

  Raises:
    ImportError: it is not installed; says how to.
  """
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise ImportError(NEEDS) from error


@functools.lru_cache(maxsize=16)
def compiled(template: str) -> Any:
  """A template, ready to be rendered."""
  jinja2, sandbox = library("jinja2"), library("jinja2.sandbox")
  ext, nodes = library("jinja2.ext"), library("jinja2.nodes")

  class Generation(ext.Extension):
    """`{% generation %}` marks what a model is trained on; it prints it."""

    tags = {"generation"}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return nodes.Scope(body).set_lineno(line)

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, "jinja2.ext.loopcontrols"],
  )
  # Jinja's own filter writes for HTML.
  environment.filters["tojson"] = to_json
  environment.globals["raise_exception"] = refuse
  environment.globals["strftime_now"] = (
    lambda form: datetime.datetime.now().strftime(form)
  )
  return environment.from_string(template)


def to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """JSON as `transformers` writes it in templates."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def chosen(templates: Any, source: str) -> str | None:
  """The default template of `chat_template`: a string, or a list of named ones.

  Raises:
    ValueError: it is of another form, or has several without a default.
  """
  if templates is None or isinstance(templates, str):
    return templates
  try:
    named = {entry["name"]: entry["template"] for entry in templates}
  except (TypeError, KeyError) as error:
    raise ValueError(
      f"{source}: chat_template must be a string, or a list of objects with"
      " name and template"
    ) from error
  if len(named) > 1 and "default" not in named:
    raise ValueError(
      f"{source}: chat_template has {sorted(named)}, and none is 'default'"
    )
  found = named.get("default", next(iter(named.values()), None))
  if found is not None and not isinstance(found, str):
    raise ValueError(f"{source}: a template must be a string")
  return found
