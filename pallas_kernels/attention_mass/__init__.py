"""How much attention keys receive, without the attention matrix."""

from pallas_kernels.attention_mass.api import attention_mass
from pallas_kernels.attention_mass.api import attention_rows
from pallas_kernels.attention_mass.api import block_mass
from pallas_kernels.attention_mass.api import masses

__all__ = ["attention_mass", "attention_rows", "block_mass", "masses"]
