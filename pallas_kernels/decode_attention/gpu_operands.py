"""A decode call in the form of the GPU kernel: one block of rows a key head.

The new tokens of all heads that share a key head are packed into the 64 rows of
the matrix unit, and each split of a read is a query block of its own, with its
share of the blocks as its list.
"""

import dataclasses

import jax
from jax import numpy as jnp

from pallas_kernels.decode_attention import operands as forms
from pallas_kernels.layout import BlockLayout
from pallas_kernels.walks import canonical, contract, gpu_plan, gpu_stream
from pallas_kernels.walks import lists as walked

ROWS = gpu_plan.ROWS
# Rows are copied in groups of these.
_GROUP = 8
# Where single tokens are gathered: what does not count has this position.
_NOWHERE = 2**31 - 1


def block_size(operands, options):
  """Entries of a block of the walk: as listed, or what suits the kernel."""
  if operands.blocks is not None:
    return options.block_size
  n = forms.length(operands, options)
  if operands.tokens is not None:
    n = operands.tokens.shape[-1]
  # Single tokens are gathered into a cache that is padded to it.
  padded = operands.tokens is not None and n > ROWS
  return 2 * ROWS if padded or n % (2 * ROWS) == 0 else ROWS


@dataclasses.dataclass(frozen=True)
class Packing:
  """Static numbers of a call.

  Attributes:
    tokens: new tokens of each example.
    share: query heads that share a key head.
    splits: as in `forms.Options`.
    causal: whether new tokens see only up to themselves.
    gathered: whether positions are streamed, because single tokens are read.
  """

  tokens: int
  share: int
  splits: int
  causal: bool
  gathered: bool

  @property
  def used(self):
    """Rows that are not padding: token by token, head by head."""
    return self.tokens * self.share

  @property
  def rows(self):
    """Rows that the kernel writes for each split."""
    return -(-self.used // _GROUP) * _GROUP

  @property
  def hides_inside(self):
    """Whether the rows of a key head differ in what they see."""
    return self.causal and self.tokens > 1


class Call:
  """Arrays of a call, with the key heads where the kernel has them.

  With the heads first each key head is an example of its own.

  Attributes:
    packing: `Packing`.
    plan: `gpu_plan.Plan`.
    q: `[B, 64, G, D]`.
    bias: `[B, H, n]` or None.
    lengths: int32 `[B]`.
    positions: int32 `[B, G, m]` of gathered tokens, or None.
    lists: see `walks.lists`.
    cache: both caches, `[B, n, G, D]` and `[B, n, G, Dv]`.
  """

  def __init__(self, operands, options):
    size = block_size(operands, options)
    batch, tokens, heads, width = operands.q.shape
    groups = forms.groups(operands, options)
    self._shape = (batch, groups)
    self.packing = Packing(
      tokens, heads // groups, options.splits, options.causal,
      operands.tokens is not None,
    )  # fmt: skip
    self.positions = None
    if self.packing.gathered:
      operands, self.positions = _gathered(operands, options, size)
    q = operands.q.reshape(batch, tokens, groups, -1, width)
    q = jnp.swapaxes(q, 1, 2).reshape(batch, groups, -1, width)
    q = jnp.swapaxes(canonical.padded(q, 2, ROWS), 1, 2)
    self.q, self.bias = q, operands.bias
    self.lengths, self.cache = operands.lengths, (operands.k, operands.v)
    layout = _layout(operands, options, size, self.packing.splits)
    if options.heads_first:
      self._flatten()
      layout = _flat_lists(layout, batch, groups)
    self._plan(layout)

  def _flatten(self):
    """Makes each key head an example."""
    batch, groups = self._shape
    apart = lambda x: x.reshape((-1, *x.shape[2:]))
    self.q = apart(jnp.swapaxes(self.q, 1, 2))[:, :, None]
    self.cache = tuple(apart(x)[:, :, None] for x in self.cache)
    self.lengths = jnp.repeat(self.lengths, groups)
    if self.bias is not None:
      share = self.packing.share
      self.bias = self.bias.reshape(batch * groups, share, -1)
    if self.positions is not None:
      self.positions = apart(self.positions)[:, None]

  def _plan(self, layout):
    k, v = self.cache
    shown = contract.Operands(self.q, k, v, self.bias, layout)
    numbers = 4 if self.bias is None else 4 + self.packing.share
    self.plan = gpu_plan.make(shown, "decode", numbers)
    self.lists = walked.rows(self.plan, layout)

  def streamed(self):
    """What goes through the ring."""
    k, v = (gpu_stream.Source(x, "group") for x in self.cache)
    found = {"k": k, "v": v}
    if self.bias is not None:
      found["bias"] = gpu_stream.Source(
        self.bias, "group", lines_per_head=self.packing.share
      )
    if self.positions is not None:
      found["positions"] = gpu_stream.Source(self.positions, "group")
    return found

  def apart(self, out, lse):
    """Results of each split, `[B, splits, G, t, share, Dv]` and without Dv."""
    packing, (batch, groups) = self.packing, self._shape
    rows = (packing.splits, packing.rows)
    out = out.reshape(*out.shape[:1], *rows, *out.shape[2:])
    out = jnp.moveaxis(out, 3, 2)[:, :, :, : packing.used]
    lse = lse.reshape(*lse.shape[:2], *rows)
    lse = jnp.moveaxis(lse, 1, 2)[..., : packing.used]
    if out.shape[0] != batch:  # Key heads are examples.
      grouped = lambda x: x[:, :, 0].reshape(batch, groups, *x[0, :, 0].shape)
      out, lse = (jnp.swapaxes(grouped(x), 1, 2) for x in (out, lse))
    tail = (packing.tokens, packing.share)
    return (
      out.reshape(*out.shape[:3], *tail, -1),
      lse.reshape(*lse.shape[:3], *tail),
    )


def _gathered(operands, options, size):
  """The cache of listed tokens alone, and their positions."""
  listed, counts = operands.tokens, operands.counts
  wide = -(-listed.shape[-1] // size) * size
  listed = canonical.padded(listed, 2, wide)
  slot = jnp.arange(wide, dtype=jnp.int32)[None, None]
  n = forms.length(operands, options)
  there = slot < counts[..., None]
  there = there & (listed >= 0) & (listed < operands.lengths[:, None, None])
  at = jnp.clip(listed, 0, n - 1)
  by_entry = (
    (lambda x: x) if options.heads_first else (lambda x: jnp.swapaxes(x, 1, 2))
  )

  def gather(x):
    found = jnp.take_along_axis(x, by_entry(at)[..., None], axis=_axis(options))
    return jnp.where(by_entry(there)[..., None], found, 0)

  bias = operands.bias
  if bias is not None:
    times = bias.shape[1] // at.shape[1]
    bias = jnp.take_along_axis(bias, jnp.repeat(at, times, axis=1), axis=2)
  operands = operands._replace(
    k=gather(operands.k), v=gather(operands.v), bias=bias
  )
  return operands, jnp.where(there, listed, _NOWHERE)


def _axis(options):
  """Where the entries of a cache are."""
  return 2 if options.heads_first else 1


def _layout(operands, options, size, splits):
  """Each split's share of the blocks, in order, as lists of full blocks."""
  n = forms.length(operands, options)
  if operands.blocks is not None:
    listed = operands.blocks
    steps = jnp.clip(operands.counts, 0, listed.shape[-1])
  else:
    filled = operands.lengths[:, None]
    if operands.tokens is not None:
      filled = jnp.clip(operands.counts, 0, n)
    steps = -(-jnp.clip(filled, 0, n) // size)
    listed = jnp.arange(n // size, dtype=jnp.int32)[None, None]
  share = -(-steps // splits)
  order = lambda n, ndim: jnp.arange(n, dtype=jnp.int32)[(None,) * ndim]
  start = order(splits, 2) * share[..., None]
  count = jnp.clip(steps[..., None] - start, 0, share[..., None])
  most = max(1, -(-listed.shape[-1] // splits))
  place = start[..., None] + order(most, 3)
  if operands.blocks is not None:
    place = jnp.clip(place, 0, listed.shape[-1] - 1)
    flat = place.reshape(*place.shape[:2], -1)
    place = jnp.take_along_axis(listed, flat, axis=2).reshape(place.shape)
  none = jnp.zeros_like(count)
  return BlockLayout(
    full_count=count, full_index=place, partial_count=none,
    partial_index=jnp.zeros((*none.shape, 0), jnp.int32),
    dropped=none[..., 0], block_q=ROWS, block_k=size, q_len=splits * ROWS,
    k_len=n,
  )  # fmt: skip


def _flat_lists(layout, batch, groups):
  """The lists where each key head is an example."""

  def flat(x):
    x = jnp.broadcast_to(x, (batch, groups, *x.shape[2:]))
    return x.reshape(batch * groups, 1, *x.shape[2:])

  return jax.tree.map(flat, layout)
