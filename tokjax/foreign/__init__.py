"""tokjax in models that are not built with its slots.

`start` carries a recipe's reductions through the blocks of any encoder;
`BlockSparseAttention` is an attention function for modules that take one.
`docs/own_model.md` shows both in Flax Linen, Flax NNX and plain JAX.
"""

from tokjax.foreign.attention import BlockSparseAttention
from tokjax.foreign.passage import Passage
from tokjax.foreign.passage import start
from tokjax.foreign.recorder import Recorder

__all__ = ["BlockSparseAttention", "Passage", "Recorder", "start"]
