"""Tensors of a file: what it says of them, and whether they fit a model."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

FLOATS = ("float64", "float32", "float16", "bfloat16")
# Values that are looked at together, so that a check needs little memory.
CHUNK = 2**24


class CheckpointError(ValueError):
  """Tensors that do not fit the model; the message lists all of them."""


class Header(NamedTuple):
  """What a file says of a tensor without reading it."""

  shape: tuple[int, ...]
  dtype: str


def check(
  headers: Mapping[str, Header],
  wanted: Mapping[str, tuple[int, ...]],
  ignored: Callable[[str], bool],
  source: str,
) -> None:
  """Raises one error that lists all that is wrong with a file's tensors."""
  wrong = []
  for name, shape in wanted.items():
    if name not in headers:
      wrong.append(f"missing: {name} {list(shape)}")
    elif tuple(headers[name].shape) != shape:
      have = list(headers[name].shape)
      wrong.append(f"misshapen: {name} {have}, must be {list(shape)}")
    elif headers[name].dtype not in FLOATS:
      dtype = headers[name].dtype
      wrong.append(f"wrong type: {name} is {dtype}, must be one of {FLOATS}")
  wrong += [
    f"extra: {name} {list(header.shape)}"
    for name, header in headers.items()
    if name not in wanted and not ignored(name)
  ]
  report(wrong, source)


def report(wrong: list[str], source: str) -> None:
  """Raises if there is anything to report."""
  if wrong:
    lines = "\n  ".join(wrong)
    raise CheckpointError(
      f"{source}: {len(wrong)} tensors do not fit\n  {lines}"
    )


def dtype_of(tensor: np.ndarray, dtype: Any) -> np.dtype:
  """The dtype wanted, None being the tensor's, as far as JAX has it enabled."""
  return jax.dtypes.canonicalize_dtype(dtype or tensor.dtype)


def cast(tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """A tensor in a dtype.

  Values beyond the dtype's range become infinite, without a warning.
  """
  with np.errstate(over="ignore"):
    return tensor.astype(dtype, copy=False)


def is_finite(x: np.ndarray) -> bool:
  """True if no value is NaN or infinite; looks at a part at a time."""
  flat = x.reshape(-1)
  parts = range(0, flat.size, CHUNK)
  return all(bool(np.isfinite(flat[i : i + CHUNK]).all()) for i in parts)


def not_finite(name: str, tensor: np.ndarray, dtype: np.dtype) -> str:
  """What is wrong with a tensor of which not all values are finite."""
  if not is_finite(tensor):
    return f"not finite: {name} holds NaN or infinity"
  return f"overflow: {name} holds values beyond the range of {dtype}"
