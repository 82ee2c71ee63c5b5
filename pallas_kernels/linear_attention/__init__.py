"""Causal linear attention with per-head decay."""

from pallas_kernels.linear_attention.api import linear_attention

__all__ = ["linear_attention"]
