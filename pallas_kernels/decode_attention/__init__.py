"""One or few queries against a long grouped-query cache."""

from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.decode_attention.merge import merge

__all__ = ["decode_attention", "merge"]
