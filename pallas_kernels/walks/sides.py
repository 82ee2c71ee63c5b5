"""What the plans of the TPU and the GPU kernels share: resident and streamed.

Every kernel keeps a block of one side, queries or keys, and streams the listed
blocks of the other past it.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sides:
  """Static numbers of a call that do not depend on the chip.

  Attributes:
    keys_resident: whether keys are resident and queries streamed.
    shared_lists: whether the lists are the same for the whole batch.
    block_q, block_k, q_blocks, k_blocks, k_len, mask_fn: of the layout.
    capacity: lengths of the full and the partial lists.
    has_bias, has_segments, has_mask, has_tag: what the call brings.
  """

  keys_resident: bool
  shared_lists: bool
  block_q: int
  block_k: int
  q_blocks: int
  k_blocks: int
  k_len: int
  mask_fn: Any
  capacity: tuple
  has_bias: bool
  has_segments: bool
  has_mask: bool
  has_tag: bool

  @property
  def resident(self):
    """Tokens in a block of the resident side."""
    return self.block_k if self.keys_resident else self.block_q

  @property
  def streamed(self):
    """Tokens in a block of the streamed side."""
    return self.block_q if self.keys_resident else self.block_k

  @property
  def resident_blocks(self):
    return self.k_blocks if self.keys_resident else self.q_blocks

  @property
  def streamed_blocks(self):
    return self.q_blocks if self.keys_resident else self.k_blocks


def read(operands, keys_resident):
  """The `Sides` of a call (see `contract.Operands`)."""
  layout = operands.layout
  lists = layout.transpose if keys_resident else layout
  return Sides(
    keys_resident=keys_resident,
    shared_lists=layout.full_count.shape[0] == 1,
    block_q=layout.block_q,
    block_k=layout.block_k,
    q_blocks=layout.q_blocks,
    k_blocks=layout.k_blocks,
    k_len=layout.k_len,
    mask_fn=layout.mask_fn,
    capacity=(lists.full_index.shape[-1], lists.partial_index.shape[-1]),
    has_bias=operands.bias is not None,
    has_segments=layout.q_segments is not None,
    has_mask=layout.partial_mask is not None,
    has_tag=layout.partial_tag is not None,
  )
