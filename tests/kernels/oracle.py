"""Attention and its gradients in float64 NumPy, written from the formulas."""

import numpy as np


def probabilities(
  q, k, mask, *, bias=None, scale=None, soft_cap=None, sinks=None
):
  """Softmax with everything, for `[b, i, h, d]` inputs.

  Returns a dict: p and the capped scores `[b, h, i, j]`, lse `[b, h, i]`.
  """
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  times = q.shape[2] // k.shape[2]
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  s = scale * np.einsum("bihd,bjhd->bhij", q, np.repeat(k, times, 2))
  capped = s if soft_cap is None else soft_cap * np.tanh(s / soft_cap)
  logits = capped
  if bias is not None:
    logits = logits + np.asarray(bias, np.float64)[:, :, None, :]
  logits = np.where(mask, logits, -np.inf)
  everything = logits
  if sinks is not None:
    column = np.asarray(sinks, np.float64)[None, :, None, None]
    column = np.broadcast_to(column, logits.shape[:3] + (1,))
    everything = np.concatenate([logits, column], -1)
  peak = np.max(everything, -1)
  peak = np.where(np.isneginf(peak), 0, peak)
  total = np.sum(np.exp(everything - peak[..., None]), -1)
  with np.errstate(divide="ignore"):
    lse = np.log(total) + peak
  p = np.exp(logits - np.where(np.isneginf(lse), 0, lse)[..., None])
  return {"p": p, "capped": capped, "lse": lse, "scale": scale}


def attention(q, k, v, mask, **options):
  """Output `[b, i, h, d]` and lse `[b, h, i]`."""
  found = probabilities(q, k, mask, **options)
  v = np.repeat(np.asarray(v, np.float64), q.shape[2] // v.shape[2], 2)
  return np.einsum("bhij,bjhd->bihd", found["p"], v), found["lse"]


def gradients(
  q, k, v, mask, d_out, d_lse, *, soft_cap=None, sinks=None, **options
):
  """Gradients of q, k, v, bias `[b, h, j]` and sinks `[h]` (0 without)."""
  found = probabilities(q, k, mask, soft_cap=soft_cap, sinks=sinks, **options)
  p, groups = found["p"], k.shape[2]
  times = q.shape[2] // groups
  q, k, v, d_out, d_lse = (
    np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse)
  )
  k_, v_ = np.repeat(k, times, 2), np.repeat(v, times, 2)
  d_p = np.einsum("bihd,bjhd->bhij", d_out, v_)
  out = np.einsum("bhij,bjhd->bihd", p, v_)
  delta = np.einsum("bihd,bihd->bhi", d_out, out) - d_lse
  d_logits = p * (d_p - delta[..., None])
  d_s = d_logits * found["scale"]
  if soft_cap is not None:
    d_s = d_s * (1 - (found["capped"] / soft_cap) ** 2)
  fold = lambda x: x.reshape(x.shape[:2] + (groups, times, -1)).sum(3)
  d_sinks = 0.0
  if sinks is not None:
    share = np.exp(np.asarray(sinks, np.float64)[None, :, None] - found["lse"])
    d_sinks = -np.sum(share * delta, (0, 2))
  return {
    "q": np.einsum("bhij,bjhd->bihd", d_s, k_),
    "k": fold(np.einsum("bhij,bihd->bjhd", d_s, q)),
    "v": fold(np.einsum("bhij,bihd->bjhd", p, d_out)),
    "bias": d_logits.sum(2),
    "sinks": d_sinks,
  }
