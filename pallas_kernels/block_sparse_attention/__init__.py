"""Block-sparse attention; `api.py` is for use, `registry.py` for kernels."""

from pallas_kernels.block_sparse_attention.api import block_sparse_attention
from pallas_kernels.block_sparse_attention.api import resolve_implementation
from pallas_kernels.block_sparse_attention.registry import implementations

__all__ = [
  "block_sparse_attention",
  "implementations",
  "resolve_implementation",
]
