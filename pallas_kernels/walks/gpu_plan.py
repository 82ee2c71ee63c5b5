"""Static decisions of the GPU kernels: tiles, warpgroups, stages, memory.

All three kernels (forward, query gradient, key and value gradient) have one
shape. A thread block keeps **resident** rows (queries, or keys in the last
one), 64 for each of its compute warpgroups, and one more warpgroup **streams**
tiles of the listed blocks past them through rings of buffers in shared memory.
Tiles of scores are `[64 resident rows, streamed columns]` in registers.

Two compute warpgroups take the two halves of a block of 128 rows, or, where
blocks have 64 rows, two query heads that share both their keys and their
lists; one alone works where neither is possible.
"""

import contextlib
import contextvars
import dataclasses
import math

from pallas_kernels.walks import sides

# Rows of a warpgroup's matrix product, and elements in a row of 128 bytes.
ROWS = 64
# What one thread block may have on Hopper, and what is left to the compiler
# for barriers, reductions and alignment.
SHARED_MEMORY = 232448
_RESERVED = 12 * 1024
_MAX_DEPTH = 4
MAX_HEAD_SIZE = 256
_changes = contextvars.ContextVar("gpu_plan_changes", default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(sides.Sides):
  """Static numbers of one kernel.

  Attributes:
    batch, heads, groups, list_heads: B, H, G (key heads), L (layout heads).
    d, dv: padded head sizes.
    resident_width: elements of resident rows and of what is staged with them.
    warpgroups: compute warpgroups of a thread block, 1 or 2.
    head_pairs: whether the warpgroups take two heads, not two halves of rows.
    tile: streamed tokens of one step; it divides the streamed block. A thread
      has n / 2 registers of a `[64, n]` float32 tile, and 240 in all: for sums
      as wide as heads, one tile of scores (forward) or two, and their rounded
      copies. 64 is the least that the matrix unit sums over.
    depth: stages of the rings.
    numbers: of 4 bytes, that come along with each streamed token, at most.
  """

  batch: int
  heads: int
  groups: int
  list_heads: int
  d: int
  dv: int
  resident_width: int
  warpgroups: int
  head_pairs: bool
  tile: int
  depth: int
  numbers: int = 4

  @property
  def rows(self):
    """Resident tokens of a thread block."""
    return ROWS if self.head_pairs else ROWS * self.warpgroups

  @property
  def row_tiles(self):
    """Thread blocks along the resident side."""
    return self.resident_blocks * self.resident // self.rows

  @property
  def parts(self):
    """Steps that a listed block takes."""
    return self.streamed // self.tile

  @property
  def group_size(self):
    """Query heads that share a key head."""
    return self.heads // self.groups

  @property
  def heads_per_cell(self):
    """Query heads that a thread block takes at once."""
    return 2 if self.head_pairs else 1

  @property
  def cells(self):
    """Thread blocks: where keys are resident, one goes through all heads."""
    across = (
      self.groups if self.keys_resident else (self.heads // self.heads_per_cell)
    )
    return self.batch * across * self.row_tiles

  def shared_memory(self, depth=None):
    """Bytes of shared memory with so many stages."""
    depth = self.depth if depth is None else depth
    resident = ROWS * self.warpgroups * self.resident_width
    stage = self.tile * (self.d + self.dv + 2 * self.numbers)
    return 2 * (resident + depth * stage) + _RESERVED


@contextlib.contextmanager
def changing(kind, **fields):
  """Changes fields of the plans of one kind that are made inside, for tuning.

  As with `aot.compiling_for`, what counts is where a kernel is traced. Whether
  the values fit together is not checked.
  """
  token = _changes.set((_changes.get() or {}) | {kind: fields})
  try:
    yield
  finally:
    _changes.reset(token)


# Kernels with one tile of scores at a time: it may be wider.
_ONE_TILE = ("forward", "decode", "mass", "linear")
_KEYS_RESIDENT = ("d_kv", "d_v", "mass", "mass_d_k")
# Bytes of float32 sums that a warpgroup of "mass" keeps, see its kernel.
MASS_SUMS = 64 * ROWS * 4


def make(operands, kind, numbers=4):
  """Returns the `Plan` of a call.

  Args:
    operands: `contract.Operands`; with transposed lists where keys are
      resident.
    kind: of attention "forward", "d_q", "d_kv", or "d_v", which is without
      d_k; "decode"; of attention mass "mass", "mass_d_q" or "mass_d_k";
      "linear".
    numbers: as in `Plan`.
  """
  changes = (_changes.get() or {}).get(kind, {})
  return dataclasses.replace(_chosen(operands, kind, numbers), **changes)


def _chosen(operands, kind, numbers):
  """The plan that is best as far as is known."""
  q, k, v, _, layout = operands
  heads, d = q.shape[2], padded(q.shape[-1])
  dv = 0 if v is None else padded(v.shape[-1])
  keys_resident = kind in _KEYS_RESIDENT
  both = sides.read(operands, keys_resident)
  shared = math.gcd(heads // k.shape[2], heads // layout.heads)
  halves = both.resident % (2 * ROWS) == 0
  head_pairs = not (halves or keys_resident or shared % 2)
  # What is staged for the result may replace what was resident.
  width = d if kind in (*_ONE_TILE, "d_v") and d == dv else d + dv
  if kind == "mass":
    width += MASS_SUMS // (2 * ROWS)
  if kind == "linear":
    width += d * dv // (2 * ROWS)  # The state, for both warpgroups.
  plan = Plan(
    **vars(both),
    batch=q.shape[0],
    heads=heads,
    groups=k.shape[2],
    list_heads=layout.heads,
    d=d,
    dv=dv,
    resident_width=width,
    warpgroups=2 if halves or head_pairs else 1,
    head_pairs=head_pairs,
    tile=ROWS,
    depth=1,
    numbers=numbers,
  )
  if kind in _ONE_TILE and dv <= 128 and both.streamed % 128 == 0:
    wide = _with_depth(dataclasses.replace(plan, tile=128))
    if wide.depth > 1:
      return wide
  return _with_depth(plan)


def _with_depth(plan):
  """The plan with as many stages as fit, at least one."""
  fits = [
    depth
    for depth in range(1, _MAX_DEPTH + 1)
    if plan.shared_memory(depth) <= SHARED_MEMORY
  ]
  return dataclasses.replace(plan, depth=max(fits, default=1))


def padded(size):
  """Head size as the kernels have it: rows of 128 bytes."""
  return -(-size // ROWS) * ROWS
