"""Decode attention for NVIDIA Hopper GPUs, by Pallas on Mosaic GPU.

Only listed or filled blocks are read, where the caller has them. Single tokens
are gathered first (by XLA), because Hopper copies rows of a matrix only if they
follow each other: they are read, written and read again. All splits run at the
same time, and are merged by their log-sum-exps.
"""

from jax import numpy as jnp

from pallas_kernels.decode_attention import gpu_kernel, gpu_operands
from pallas_kernels.decode_attention import operands as forms
from pallas_kernels.decode_attention.merge import merge
from pallas_kernels.walks import gpu_targets, hidden

_ROWS = gpu_operands.ROWS


def supports(operands, options):
  """The reason against these operands, or None; see `contract`."""
  q, k, v = operands.q, operands.k, operands.v
  reason = gpu_targets.unsupported_arrays(q, v)
  if reason is not None:
    return reason
  for name, size in (("k", k.shape[-1]), ("v", v.shape[-1])):
    # Padding would copy the cache in every step.
    if size % _ROWS:
      return f"{name} have head size {size}, the kernel needs a multiple of 64"
  rows = q.shape[1] * q.shape[2] // forms.groups(operands, options)
  if rows > _ROWS:
    return (
      f"{q.shape[1]} new tokens of the heads that share a key head are {rows} "
      "rows, the kernel takes at most 64"
    )
  n, size = forms.length(operands, options), _ROWS
  if operands.blocks is not None:
    size = options.block_size
  if operands.tokens is None and (size % _ROWS or n % size):
    return (
      f"block_size is {size} and the cache has {n} entries; the kernel needs "
      "a block_size that is a multiple of 64 and divides the cache"
    )
  return None


def attend(operands, options, interpret=None):
  """Returns output `[B, t, H, Dv]` and log-sum-exp `[B, H, t]`."""
  call = gpu_operands.Call(operands, options)
  found = hidden.results(*gpu_kernel.run(call, options, interpret))
  out, lse = call.apart(*found)
  out, lse = merge(out.astype(jnp.float32), lse, axis=1)  # [B, G, t, share]
  batch, _, tokens, _, width = out.shape
  out = jnp.swapaxes(out, 1, 2).reshape(batch, tokens, -1, width)
  return out, jnp.swapaxes(lse, 2, 3).reshape(batch, -1, tokens)


IMPLEMENTATIONS, interpreted = gpu_targets.implementations(
  attend, None, supports
)
