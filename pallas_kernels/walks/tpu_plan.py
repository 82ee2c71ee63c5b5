"""Static decisions of the TPU kernels: what a grid cell holds and how it walks.

All three kernels (forward, query gradient, key and value gradient) have one
shape. A cell keeps a **resident** block (queries, or keys in the last one) in
VMEM and **streams** the blocks of its lists past it. The tile of scores is
always `[resident rows, streamed columns]`.

*   Query heads that share both their keys and their lists are **packed**: one
    load of a key block serves them all.
*   Short streamed blocks are loaded **together**, so that one step of the loop
    is worth its overhead; what is left of a list goes one by one.
*   `depth` buffers hold what was loaded ahead.
"""

import dataclasses
import math

from pallas_kernels.walks import sides

LANES = 128
# Rows, columns and elements of a tile of scores, at most. By the compiler's
# schedules for v5e and v6e: longer rows hide more of the softmax behind the
# matrix unit, until the tile no longer fits the registers' traffic to VMEM.
_TILE_ROWS = 512
_TILE_COLUMNS = 1024
_TILE_AREA = 512 * 512
# Rows of a packed block, at most, unless one block alone is larger.
_PACKED_ROWS = 1024
_STREAM_BYTES = 8 * 2**20
# Every TPU in question has at least 64 MiB of VMEM per core.
VMEM_LIMIT = 48 * 2**20


def too_large(what, needed, advice):
  """The reason against what needs so many bytes of VMEM, or None."""
  if needed <= VMEM_LIMIT:
    return None
  return (
    f"{what} need about {needed >> 20} MiB of VMEM, at most "
    f"{VMEM_LIMIT >> 20} are used; {advice}"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(sides.Sides):
  """Static numbers of one kernel.

  Attributes:
    batch: number of examples B.
    packs: packs of query heads, H / pack.
    pack: query heads in a pack.
    packs_per_group: packs that share a key head.
    packs_per_list: packs that share a layout head.
    turns: packs that a resident block goes through one after the other: 1, or
      `packs_per_group` where the keys are resident.
    blocks: listed blocks of a layout head, at most.
    d, dv: padded head sizes; dv is 0 where there are no values.
    item: bytes of an element of q, k and v.
  """

  batch: int
  packs: int
  pack: int
  packs_per_group: int
  packs_per_list: int
  blocks: int
  d: int
  dv: int
  item: int

  @property
  def turns(self):
    return self.packs_per_group if self.keys_resident else 1

  @property
  def streamed_heads(self):
    """Heads in one streamed block: keys come alone, queries as a pack."""
    return self.pack if self.keys_resident else 1

  @property
  def grid(self):
    across = self.packs // self.turns
    return (self.batch, across, self.resident_blocks * self.turns)

  @property
  def together(self):
    """Streamed blocks of one wide step."""
    rows = self.streamed * self.streamed_heads
    # Lists of fewer than four wide steps would mostly be left-overs.
    return max(1, min(self._tile_columns // rows, self.capacity[0] // 4))

  @property
  def width(self):
    """Columns of a wide step."""
    return self.together * self.streamed

  @property
  def depth(self):
    """Stream buffers: four, or as many as fit, but at least two."""
    rows = self.width * self.streamed_heads
    step = rows * (self.d + self.dv) * self.item
    if self.has_mask:
      step += self.block_q * self.block_k
    return max(2, min(4, _STREAM_BYTES // step))

  @property
  def tile_rows(self):
    return largest_tile(self.resident, _TILE_ROWS)

  def tile_columns(self, width):
    return largest_tile(width, self._tile_columns)

  @property
  def _tile_columns(self):
    return min(_TILE_COLUMNS, _TILE_AREA // self.tile_rows)

  def vmem(self):
    """Bytes of VMEM that the kernel needs, by a generous estimate."""
    step = self.width * self.streamed_heads
    stream = self.depth * step * ((self.d + self.dv) * self.item + 3 * 32)
    if self.has_mask:
      stream += self.depth * self.block_q * self.block_k
    rows = self.resident * (1 if self.keys_resident else self.pack)
    lines = self.resident * self.pack * LANES * 4 * 4
    # Inputs and outputs twice (pipelined), and float32 sums.
    resident = rows * (self.d + self.dv) * (4 * self.item + 2 * 4)
    tile = self.tile_rows * self.tile_columns(self.width) * 4 * 8
    return stream + lines + resident + tile

  def steps(self):
    """Streamed blocks of all cells, at most: counts are not known here."""
    return self.batch * self.packs * self.blocks


def largest_tile(size, limit):
  """Largest multiple of 128 that divides `size` and is at most `limit`."""
  return max(n for n in range(LANES, limit + 1, LANES) if size % n == 0)


def lane_padded(size):
  """The next multiple of 128."""
  return -(-size // LANES) * LANES


def make(operands, keys_resident=False):
  """Returns the `Plan` of a call (see `contract.Operands`)."""
  q, k, v, _, layout = operands
  batch, _, heads, d = q.shape
  per_group, per_list = heads // k.shape[2], heads // layout.heads
  pack = _pack(math.gcd(per_group, per_list), layout.block_q)
  both = sides.read(operands, keys_resident)
  blocks = min(
    layout.q_blocks * min(sum(layout.capacity), layout.k_blocks),
    both.resident_blocks * sum(both.capacity),
  )
  return Plan(
    **vars(both),
    batch=batch,
    packs=heads // pack,
    pack=pack,
    packs_per_group=per_group // pack,
    packs_per_list=per_list // pack,
    blocks=blocks,
    d=lane_padded(d),
    dv=0 if v is None else lane_padded(v.shape[-1]),
    item=q.dtype.itemsize,
  )


def _pack(heads, block_q):
  """Largest divisor of `heads` whose packed block is not too long."""
  return max(
    n
    for n in range(1, heads + 1)
    if heads % n == 0 and (n == 1 or n * block_q <= _PACKED_ROWS)
  )
