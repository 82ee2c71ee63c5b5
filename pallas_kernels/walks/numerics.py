"""Numerics that every implementation shares, usable inside a Pallas kernel."""

from jax import numpy as jnp

from pallas_kernels.layout import types


def capped(s, soft_cap):
  """Soft cap of scaled scores: `soft_cap * tanh(s / soft_cap)`, or s."""
  return s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)


def cap_slope(capped_s, soft_cap):
  """Derivative of `capped`, from its result."""
  ratio = capped_s / soft_cap
  return 1 - ratio * ratio


def element_mask(
  layout, h, q, k, *, tag=None, stored=None, q_segments=None, k_segments=None
):
  """Visibility of the pairs of one partial block.

  Args:
    layout: BlockLayout; only its static fields are read.
    h: int32 scalar, the query head.
    q, k: int32 positions of one rank, broadcastable, e.g. `[bq, 1]`, `[1, bk]`.
    tag: int32 scalar, this block's entry of `partial_tag`, if there is one.
    stored: bool `[bq, bk]`, this block's entry of `partial_mask`, if any.
    q_segments, k_segments: int32 shaped like q and k, if there are segments.

  Returns:
    bool that broadcasts to the block, or None if all pairs are visible.
  """
  parts = []
  if layout.mask_fn is not None:
    parts.append(types.apply_mask_fn(layout.mask_fn, h, q, k, tag))
  if layout.k_len % layout.block_k:
    parts.append(k < layout.k_len)
  if stored is not None:
    parts.append(stored)
  if q_segments is not None:
    parts.append(q_segments == k_segments)
  mask = None
  for part in parts:
    mask = part if mask is None else mask & part
  return mask
