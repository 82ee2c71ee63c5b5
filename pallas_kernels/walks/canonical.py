"""Brings the arguments of a call into the canonical form of `contract`."""

import math

from jax import numpy as jnp

from pallas_kernels import layout as layouts
from pallas_kernels.walks import contract


def operands(
  q, k, v, layout, bias=None, q_segment_ids=None, k_segment_ids=None
):
  """Returns `contract.Operands`; v may be None where it is not needed."""
  if (q_segment_ids is None) != (k_segment_ids is None):
    raise ValueError("q_segment_ids and k_segment_ids must be given together")
  batch, heads = q.shape[:-3], q.shape[-2]
  if q_segment_ids is not None:
    layout = layouts.with_segments(layout, q_segment_ids, k_segment_ids)
  layout = layouts.with_lead(layout, batch)
  q_size = layout.q_blocks * layout.block_q
  k_size = layout.k_blocks * layout.block_k
  if bias is not None:
    bias = lines(bias, q, batch + (heads, layout.k_len), k_size)
  flat = lambda x, size: padded(x.reshape((-1,) + x.shape[-3:]), 1, size)
  return contract.Operands(
    flat(q, q_size),
    flat(k, k_size),
    None if v is None else flat(v, k_size),
    bias,
    layout,
  )


def lines(x, q, shape, size):
  """Broadcasts `x` to `[*b, H, n]`, then flattens b and pads n to `size`."""
  x = x.astype(contract.acc_dtype(q))
  x = jnp.expand_dims(x, tuple(range(len(shape) - x.ndim)))
  x = padded(jnp.broadcast_to(x, shape), -1, size)
  return x.reshape((-1,) + x.shape[-2:])


def params(q, scale, soft_cap, precision):
  """Returns `contract.Params`, with the default scale filled in."""
  scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
  return contract.Params(
    scale, None if soft_cap is None else float(soft_cap), precision
  )


def padded(x, axis, size):
  """Pads one axis with zeros to `size`."""
  if x.shape[axis] == size:
    return x
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, pad)


def check(q, k, v, layout):
  """Raises ValueError for shapes that do not fit together."""
  given = [x for x in (q, k, v) if x is not None]
  shapes = ", ".join(str(x.shape) for x in given)
  if (
    q.ndim < 3
    or k.shape[:-3] != q.shape[:-3]
    or (v is not None and k.shape[:-1] != v.shape[:-1])
  ):
    raise ValueError(
      f"q, k, v have shapes {shapes}; they must be "
      "[*b, q_len, H, D], [*b, k_len, G, D], [*b, k_len, G, Dv]"
    )
  if q.shape[-1] != k.shape[-1] or not math.prod(q.shape) * math.prod(k.shape):
    raise ValueError(
      f"q and k have shapes {q.shape} and {k.shape}; they need one head "
      "size, and no axis may be empty"
    )
  dtypes = {str(x.dtype) for x in given}
  if len(dtypes) > 1 or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(
      f"q, k, v have dtypes {sorted(dtypes)}; they need one floating dtype"
    )
  heads = q.shape[-2]
  for name, number in (("key", k.shape[-2]), ("layout", layout.heads)):
    if heads % number:
      raise ValueError(
        f"{number} {name} heads do not divide the {heads} query heads"
      )
  told_apart = getattr(layout.mask_fn, "heads", 1)
  if told_apart not in (1, heads):
    raise ValueError(
      f"the layout's mask function tells {told_apart} heads apart, but q has "
      f"{heads}"
    )
  if (layout.q_len, layout.k_len) != (q.shape[-3], k.shape[-3]):
    raise ValueError(
      f"layout is for q_len={layout.q_len}, k_len={layout.k_len}, but q and "
      f"k have lengths {q.shape[-3]} and {k.shape[-3]}"
    )
