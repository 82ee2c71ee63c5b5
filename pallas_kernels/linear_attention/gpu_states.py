"""The states before the cells of a sequence, for the GPU kernel; plain XLA.

The states that cells add are products of matrices, and what they leave to later
cells too: `M @ added`, with powers of the decay in a triangular M, takes one
pass over them where a scan would take a launch for each cell.
"""

import numpy as np
from jax import lax
from jax import numpy as jnp


def before_cells(order, a, b, log_decay, initial):
  """States before each cell in the order of the walk, and after the last.

  Args:
    order: `gpu_kernel.Order`.
    a, b: `[B, tokens, heads, width]`, padded with zeros; heads are the query
      heads, or those that they share.
    log_decay: float32 `[B, H]`.
    initial: float32 `[B, H, D, Dv]`.

  Returns:
    float32 `[B, H, cells, D, Dv]` and `[B, H, D, Dv]`. A state is the sum of
    `a[t]^T b[t]`, decayed until the last token before the cell (with shift 0:
    until the first token of the cell).
  """
  added = _added(order, a, b, log_decay)
  weights = _powers(log_decay, _between(order))
  states = jnp.einsum(
    "bhxy,bhyde->bhxde", weights[..., :-1], added,
    precision=lax.Precision.HIGHEST,
  )  # fmt: skip
  states += weights[..., -1, None, None] * initial[:, :, None]
  return states[:, :, :-1], states[:, :, -1]


def _powers(log_decay, steps):
  """`w ** steps` for each head, `[B, H, ...]`; 0 for negative steps."""
  steps = jnp.asarray(steps, jnp.float32)[None, None]
  wide = log_decay.reshape(log_decay.shape + (1,) * (steps.ndim - 2))
  return jnp.where(steps >= 0, jnp.exp(wide * jnp.maximum(steps, 0)), 0)


def _added(order, a, b, log_decay):
  """What each cell adds: `[B, H, cells, D, Dv]`."""
  heads, size = log_decay.shape[1], order.cell
  tokens = np.arange(order.cells * size).reshape(order.cells, size)
  first, end = _ends(order)
  if order.reverse:
    steps = tokens - first[:, None]
  else:
    steps = np.maximum(end[:, None] - 1 - tokens, 0)
  until = _powers(log_decay, steps + 1 - order.shift)  # [B, H, cells, size]
  until = jnp.moveaxis(until, 1, 3)[..., None]

  def cut(x):
    pad = order.cells * size - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
    x = x.reshape(x.shape[0], order.cells, size, *x.shape[2:])
    return jnp.repeat(x, heads // x.shape[3], axis=3)

  scaled = (cut(a).astype(jnp.float32) * until).astype(a.dtype)
  return jnp.einsum(
    "bcthd,bcthe->bhcde", scaled, cut(b),
    preferred_element_type=jnp.float32,
  )  # fmt: skip


def _ends(order):
  """First token of each cell, and the end of those that are there."""
  first = np.arange(order.cells) * order.cell
  return first, np.minimum(first + order.cell, order.length)


def _between(order):
  """Steps from what each cell adds (and the initial state) to each state.

  int `[cells + 1, cells + 1]`; negative where there is no way. Rows are the
  states before the cells, and the last state; columns what the cells add, and
  the initial state.
  """
  first, end = _ends(order)
  n = order.length
  if order.reverse:
    # The same, counted from the end.
    first, end = n - end, n - first
  starts, ends = np.append(first, n), end
  steps = starts[:, None] - np.append(ends, 0)[None, :]
  turn = np.arange(order.cells + 1)
  if order.reverse:
    turn[:-1] = turn[:-1][::-1]
  earlier = turn[None, :-1] < turn[:, None]
  steps[:, :-1] = np.where(earlier, steps[:, :-1], -1)
  return steps
