"""How many parts a GPU cuts a read of the cache into, where nobody says.

A thread block takes one part of the entries of one key head, and a
multiprocessor holds one thread block: what counts is how many rounds of them
there are, and how long the longest part is. Parts cost something too: each
waits for its first entries alone, and their results are merged.
"""

import jax

from pallas_kernels.decode_attention import gpu_operands
from pallas_kernels.decode_attention import operands as forms

# Multiprocessors of an H100 SXM and of an H200, where no GPU is asked.
_MULTIPROCESSORS = 132
# What a part costs on top of its tiles, in tiles. Estimated, not measured.
_OVERHEAD = 2


def choose(cells, tiles, multiprocessors=_MULTIPROCESSORS):
  """The number of parts with the least `rounds * (longest part + overhead)`.

  Args:
    cells: batch times key heads.
    tiles: that are read for each of them, at most.
    multiprocessors: of the GPU.

  Returns:
    The number of parts, the smallest of those that are equally good.
  """
  rounds = lambda parts: -(-cells * parts // multiprocessors)
  cost = lambda parts: rounds(parts) * (-(-tiles // parts) + _OVERHEAD)
  return min(range(1, max(tiles, 1) + 1), key=cost)


def of_call(name, operands, options):
  """Parts of a call: 1, but for the GPU kernel.

  Args:
    name: of the implementation.
    operands: `operands.Operands`.
    options: `operands.Options`.
  """
  if name not in ("gpu", "gpu_interpret"):
    return 1
  size = gpu_operands.block_size(operands, options)
  if operands.blocks is not None:
    tiles = operands.blocks.shape[-1]
  elif operands.tokens is not None:
    tiles = -(-operands.tokens.shape[-1] // size)
  else:
    tiles = forms.length(operands, options) // size
  cells = operands.q.shape[0] * forms.groups(operands, options)
  return choose(cells, tiles, _multiprocessors())


def _multiprocessors():
  """Of this machine's GPU, or of those that the kernel is made for."""
  if jax.default_backend() != "gpu":
    return _MULTIPROCESSORS
  return getattr(jax.local_devices()[0], "core_count", _MULTIPROCESSORS)
