"""Decode attention in plain XLA: reads listed or filled entries only.

A loop over (batch, key head, split); within it a loop over steps of
`block_size` entries with a running softmax. Queries of a group of heads share
every read. Splits are merged by their log-sum-exps.
"""

from jax import lax
from jax import numpy as jnp

from pallas_kernels.decode_attention import operands as forms
from pallas_kernels.decode_attention.merge import merge
from pallas_kernels.walks import contract, int32, numerics


def attend(operands, options):
  """Returns output `[B, t, H, Dv]` and log-sum-exp `[B, H, t]`."""
  batch, t, heads, _ = operands.q.shape
  groups, splits = forms.groups(operands, options), options.splits
  end = forms.last_visible(operands, options)

  def one(n):
    b, g = n // (groups * splits), n // splits % groups
    return _one(operands, options, end, b, g, n % splits)

  out, lse = lax.map(one, jnp.arange(batch * groups * splits))
  out = out.reshape(batch, groups, splits, t, heads // groups, -1)
  lse = lse.reshape(out.shape[:-1])
  out, lse = merge(out, lse, axis=2)  # [B, G, t, m, Dv], [B, G, t, m]
  out = jnp.swapaxes(out, 1, 2).reshape(batch, t, heads, -1)
  lse = jnp.swapaxes(lse, 2, 3).reshape(batch, heads, t)
  return out, lse


def _one(operands, options, end, b, g, split):
  """One key head and split: output `[t, m, Dv]`, log-sum-exp `[t, m]`."""
  q, _, v, _, _, *_ = operands
  _, t, heads, width = q.shape
  dtype = contract.acc_dtype(q)
  m = heads // forms.groups(operands, options)
  query = int32.read(q, (b, 0, g * m, 0), (1, t, m, width))
  query = query.reshape(t * m, width).astype(dtype)
  steps = _steps(operands, options, b, g)
  share = -(-steps // options.splits)
  start = split * share

  def step(i, state):
    peak, mass, acc = state
    at, valid, k, value = _read(operands, options, b, g, i)
    s = options.scale * jnp.dot(query, k.astype(dtype).T)
    logits = numerics.capped(s, options.soft_cap).reshape(t, m, -1)
    if operands.bias is not None:
      logits = logits + _bias(operands, b, g, m, at)[None]
    seen = valid[None, :] & (at[None, :] < end[b][:, None])
    logits = jnp.where(seen[:, None, :], logits, -jnp.inf)
    logits = logits.reshape(t * m, -1)
    new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
    p = jnp.exp(logits - new_peak[:, None])
    shrink = jnp.exp(peak - new_peak)
    acc = acc * shrink[:, None] + jnp.dot(p, value.astype(dtype))
    return new_peak, mass * shrink + jnp.sum(p, axis=1), acc

  peak, mass, acc = lax.fori_loop(
    start,
    jnp.minimum(start + share, steps),
    step,
    (
      jnp.full((t * m,), contract.MAX_INIT, dtype),
      jnp.zeros((t * m,), dtype),
      jnp.zeros((t * m, v.shape[-1]), dtype),
    ),
  )
  some = jnp.where(mass > 0, mass, 1)
  lse = jnp.where(mass > 0, jnp.log(some) + peak, -jnp.inf)
  return (acc / some[:, None]).reshape(t, m, -1), lse.reshape(t, m)


def _steps(operands, options, b, g):
  """Number of steps that hold all that counts."""
  if operands.blocks is not None:
    return operands.counts[b, g]
  filled = operands.lengths[b]
  if operands.tokens is not None:
    filled = operands.counts[b, g]
  return -(-filled // options.block_size)


def _bias(operands, b, g, m, at):
  """Bias of the entries read, `[m, size]`."""
  rows = int32.read(
    operands.bias, (b, g * m, 0), (1, m, operands.bias.shape[2])
  )[0]
  return jnp.take(rows, at, axis=1, mode="clip")


def _read(operands, options, b, g, i):
  """Entries of step i: positions, whether they count, keys and values."""
  n, size = forms.length(operands, options), options.block_size
  if operands.tokens is not None:
    listed = operands.tokens[b, g]
    slot = i * size + jnp.arange(size, dtype=jnp.int32)
    at = jnp.take(listed, slot, mode="clip")
    valid = slot < operands.counts[b, g]
    rows = lambda x: jnp.take(
      x[b, g] if options.heads_first else x[b, :, g], at, axis=0, mode="clip"
    )
    return at, valid, rows(operands.k), rows(operands.v)
  block = i if operands.blocks is None else operands.blocks[b, g, i]
  # The last block may be cut off: read up to the end, and not twice.
  first = jnp.minimum(block * size, n - size)
  at = first + jnp.arange(size, dtype=jnp.int32)
  start, shape = (b, first, g, 0), (1, size, 1)
  if options.heads_first:
    start, shape = (b, g, first, 0), (1, 1, size)
  rows = lambda x: int32.read(x, start, shape + (x.shape[-1],)).reshape(
    size, -1
  )
  return at, at >= block * size, rows(operands.k), rows(operands.v)


IMPLEMENTATIONS = (
  contract.Implementation("xla", attend, None, platforms=("cpu", "gpu", "tpu")),
)
