"""Checks an operation against its own reference, computed in float64.

The reference is the plain formula in each operation's folder, differentiated
by JAX and run on the CPU; the tests compare it with formulas in NumPy.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, Any]
Call = Callable[[Arrays, Any, str], tuple[jax.Array, ...]]

# Operands, probabilities and gradients of scores are rounded to 8 bits. What
# stays in float32 (log-sum-exps, masses) is off by what a soft cap is, whose
# tanh has 11 bits on a GPU.
ROUNDED, FLOAT32 = 3e-2, 5e-3


def check(
  call: Call,
  arrays: Arrays,
  fixed: Any,
  implementation: str | None,
  backward: bool = True,
) -> dict[str, Any]:
  """Compares results and gradients with exact ones.

  Args:
    call: `(arrays, fixed, implementation) -> tuple of arrays`.
    arrays: NumPy arrays by name, which gradients are taken of.
    fixed: a pytree of integers, such as a layout.
    implementation: that is checked.
    backward: whether gradients are compared, too.

  Returns:
    The fields of a row: `right`, and the array that is the most off, for what
    is allowed: its largest error over its largest number, or the same of norms
    if that is more. What is not finite has to agree.
  """
  found = _both(call, arrays, fixed, implementation, backward)
  with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
    wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    fixed = jax.tree.map(np.asarray, fixed)
    exact = _both(call, wide, fixed, "reference", backward)
  errors = {name: error(found[name], exact[name]) for name in exact}
  worst = max(errors, key=lambda name: errors[name] / _allowed(name, found))
  return {
    "right": all(errors[n] <= _allowed(n, found) for n in errors),
    "most off": worst,
    "by": errors[worst],
    "allowed": _allowed(worst, found),
  }


def _allowed(name: str, found: Arrays) -> float:
  exact = name.startswith("result") and found[name].dtype == np.float32
  return FLOAT32 if exact else ROUNDED


def _both(call, arrays, fixed, implementation, backward) -> Arrays:
  """Results, and gradients of their sum with weights, by name."""

  @jax.jit
  def run(arrays, fixed):
    forward = lambda arrays: call(arrays, fixed, implementation)
    if not backward:
      return forward(arrays), {}
    results, pullback = jax.vjp(forward, arrays)
    return results, pullback(tuple(map(_weights, results)))[0]

  results, gradients = run(arrays, fixed)
  named = {f"result {n}": x for n, x in enumerate(results)}
  named |= {f"d_{name}": x for name, x in gradients.items()}
  return {name: np.asarray(x) for name, x in named.items()}


def _weights(result: jax.Array) -> jax.Array:
  """Cotangents of a result; 0 where it is infinite, as of an empty row."""
  drawn = np.random.default_rng(1).normal(size=result.shape)
  rounded = jnp.asarray(drawn, jnp.bfloat16).astype(result.dtype)
  return jnp.where(jnp.isfinite(result), rounded, 0)


def error(found: np.ndarray, exact: np.ndarray) -> float:
  """How far off an array is; infinite where what is not finite differs."""
  found = np.asarray(found, np.float64)
  finite = np.isfinite(exact)
  if not np.array_equal(found[~finite], exact[~finite]):
    return float("inf")
  found, exact = found[finite], exact[finite]
  if not np.isfinite(found).all():
    return float("inf")
  if not found.size:
    return 0.0
  share = lambda off, size: float(off / size if size else off)
  return max(
    share(np.abs(found - exact).max(), np.abs(exact).max()),
    share(np.linalg.norm(found - exact), np.linalg.norm(exact)),
  )
