"""Sums of matrix products that the GPU kernels keep in registers.

A sum of `[64, width]` is a tuple of parts of at most 128 columns.
"""

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.walks import gpu_tiles as tiles

# Wider parts leave the assembler no room to move them.
COLUMNS = 128


def columns(width):
  """Starts and sizes of parts of at most `COLUMNS` columns."""
  starts = range(0, width, COLUMNS)
  return [(start, min(COLUMNS, width - start)) for start in starts]


def zeros(width):
  """A sum of `[64, width]`, in parts."""
  return tuple(tiles.full((tiles.ROWS, size), 0) for _, size in columns(width))


def add(cell, sums, factors):
  """Adds `a @ b` to each sum.

  Args:
    cell: `gpu_call.Cell`.
    sums: tuple of sums in parts.
    factors: for each sum, a in registers, and b a reference.
  """
  parts, products = [], []
  for total, (a, b) in zip(sums, factors, strict=True):
    for part, span in zip(total, columns(b.shape[1]), strict=True):
      parts.append(part)
      products.append((a, b.at[:, pl.ds(*span)]))
  found = iter(tiles.accumulate(parts, products, cell.own("staged")))
  return tuple(tuple(next(found) for _ in total) for total in sums)


def put(buffer, sums, factor=1.0):
  """Writes a sum where a copy to global memory then reads."""
  for part, value in zip(columns(buffer.shape[1]), sums, strict=True):
    buffer[:, pl.ds(*part)] = (value * factor).astype(buffer.dtype)
  plgpu.commit_smem()
