"""Checks of configurations: every fault of one is in one error."""

import math
import numbers
from collections.abc import Iterable, Iterator
from typing import Any


def check(found: Iterable[str]) -> None:
  """Raises one ValueError that lists all of `found`, if there is any."""
  if lines := list(found):
    raise ValueError("; ".join(lines))


def integers(config: Any, names: Iterable[str], least: int) -> Iterator[str]:
  """Faults of fields that must be integers of `least` or more."""
  for name in names:
    value = getattr(config, name)
    if not is_integer(value) or value < least:
      yield f"{name}={value!r}: must be {least} or more, as an integer"


def positives(config: Any, names: Iterable[str]) -> Iterator[str]:
  """Faults of fields that must be finite numbers above 0, or None."""
  for name in names:
    value = getattr(config, name)
    if value is not None and not is_positive(value):
      yield f"{name}={value!r}: must be a finite number above 0"


def is_integer(value: Any) -> bool:
  """An integer of Python or numpy; a bool is none."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
  """A finite real number above 0; a bool is none."""
  real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  return real and math.isfinite(value) and value > 0
