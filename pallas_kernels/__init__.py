"""Sparse and linear attention kernels for JAX; depends on JAX alone.

One folder per operation: `api` (the public function), `contract` where there
is one, `reference` (obvious, slow), `xla` (saves work on any backend), `tpu`
and `gpu` (Pallas).
"""

from pallas_kernels.attention_mass.api import attention_mass
from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.layout.types import BlockLayout
from pallas_kernels.linear_attention.api import linear_attention

__all__ = [
  "attention_mass",
  "block_sparse_attention",
  "BlockLayout",
  "decode_attention",
  "linear_attention",
]
