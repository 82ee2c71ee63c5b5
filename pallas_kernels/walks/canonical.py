"""Brings the arguments of a call into the canonical form of `contract`."""

import dataclasses
import math
from typing import Any

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import layout as layouts
from pallas_kernels.walks import contract


def _static(default):
  return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """The arguments that all operations over a layout share, as a caller gives.

  Attributes:
    q: `[*b, q_len, H, D]`.
    k: `[*b, k_len, G, D]`, G dividing H: query head h reads key head
      `h // (H // G)`.
    v: `[*b, k_len, G, Dv]`, or None where no values are read.
    layout: BlockLayout for these lengths; its leading axes broadcast to b, its
      number of heads divides H.
    bias: broadcastable to `[*b, H, k_len]`, or None.
    q_segment_ids, k_segment_ids: integers `[*b, q_len]` and `[*b, k_len]`, or
      None both.
    scale: static factor on q.k; None: `D ** -0.5`.
    soft_cap: static cap of logits, or None.
    precision: `jax.lax.Precision` of the products; None: the backend's.
  """

  q: Float[Array, "*b q h d"]
  k: Float[Array, "*b k g d"]
  v: Float[Array, "*b k g e"] | None = None
  layout: layouts.BlockLayout
  bias: Float[Array, "..."] | None = None
  q_segment_ids: Int[Array, "*b q"] | None = None
  k_segment_ids: Int[Array, "*b k"] | None = None
  scale: float | None = _static(None)
  soft_cap: float | None = _static(None)
  precision: Any = _static(None)

  def canonical(self) -> tuple[contract.Operands, contract.Params]:
    """Checked operands and static numbers.

    Raises:
      ValueError: for shapes or dtypes that do not fit together.
    """
    _check(self)
    return _operands(self), _params(self)


def _operands(call: Call) -> contract.Operands:
  """Padded, with one batch axis; segments become part of the layout."""
  q, layout, bias = call.q, call.layout, call.bias
  if (call.q_segment_ids is None) != (call.k_segment_ids is None):
    raise ValueError("q_segment_ids and k_segment_ids must be given together")
  batch, heads = q.shape[:-3], q.shape[-2]
  if call.q_segment_ids is not None:
    layout = layouts.with_segments(
      layout, call.q_segment_ids, call.k_segment_ids
    )
  layout = layouts.with_lead(layout, batch)
  q_size = layout.q_blocks * layout.block_q
  k_size = layout.k_blocks * layout.block_k
  if bias is not None:
    bias = lines(bias, q, batch + (heads, layout.k_len), k_size)
  flat = lambda x, size: padded(x.reshape((-1,) + x.shape[-3:]), 1, size)
  return contract.Operands(
    flat(q, q_size),
    flat(call.k, k_size),
    None if call.v is None else flat(call.v, k_size),
    bias,
    layout,
  )


def _params(call: Call) -> contract.Params:
  """Static numbers, with the default scale filled in."""
  scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
  cap = None if call.soft_cap is None else float(call.soft_cap)
  return contract.Params(float(scale), cap, call.precision)


def lines(x, q, shape, size):
  """Broadcasts `x` to `[*b, H, n]`, then flattens b and pads n to `size`."""
  x = x.astype(contract.acc_dtype(q))
  x = jnp.expand_dims(x, tuple(range(len(shape) - x.ndim)))
  x = padded(jnp.broadcast_to(x, shape), -1, size)
  return x.reshape((-1,) + x.shape[-2:])


def padded(x, axis, size):
  """Pads one axis with zeros to `size`."""
  if x.shape[axis] == size:
    return x
  pad = [(0, 0)] * x.ndim
  pad[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, pad)


def _check(call):
  """Raises ValueError for shapes that do not fit together."""
  q, k, v, layout = call.q, call.k, call.v, call.layout
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
