"""The `attend` slot: who sees whom, and with which weight."""

from tokjax.attention.block_sparse import BlockSparse
from tokjax.attention.dense import Dense
from tokjax.attention.dense import probabilities
from tokjax.attention.dense import received

__all__ = ["BlockSparse", "Dense", "probabilities", "received"]
