"""Functions with options bound that compare equal, for static arguments."""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bound:
  """A function with options bound: `functools.partial` that compares equal.

  Attributes:
    function: a module-level function.
    options: names and values, sorted by name.
  """

  function: Callable[..., Any]
  options: tuple[tuple[str, Any], ...]

  def __call__(self, *args, **kwargs):
    return self.function(*args, **dict(self.options), **kwargs)

  @property
  def asks(self) -> tuple[Any, ...]:
    """Questions of the function, and those among the options."""
    own = getattr(self.function, "asks", ())
    bound = [value for _, value in self.options]
    more = [q for value in bound for q in _questions(value)]
    return (*own, *(q for q in more if q not in own))


def _questions(value: Any) -> tuple[Any, ...]:
  if getattr(value, "is_question", False):
    return (value,)
  return value.asks if isinstance(value, Bound) else ()


def bind(function: Callable[..., Any], **options) -> Bound:
  """Binds options to a rule; they must be hashable.

  Options that are questions (see `tokjax.signals`) are asked of the model.
  """
  bound = Bound(function, tuple(sorted(options.items())))
  hash(bound)
  return bound
