"""Block lists of PyTorch's FlexAttention, through its own `BlockMask`."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels import layout as layouts

flex = pytest.importorskip("torch.nn.attention.flex_attention")
torch = pytest.importorskip("torch")
SIZES = {"q_len": 64, "k_len": 96, "block_q": 16, "block_k": 32}


def dense_of(mask):
  """Its block map, bool `[b, h, q blocks, k blocks]`."""
  return mask.to_dense().numpy() > 0


def test_a_layout_becomes_a_block_mask_and_comes_back():
  pattern = layouts.Causal(16) & layouts.Window(40) | layouts.Sinks(3)
  layout = layouts.from_pattern(pattern, **SIZES)
  lists = {
    name: torch.tensor(np.asarray(x)[None])
    for name, x in layouts.to_flex(layout).items()
  }
  mask = flex.BlockMask.from_kv_blocks(
    **lists,
    BLOCK_SIZE=(16, 32),
    mask_mod=lambda b, h, q, k: (
      ((k <= q + 16) & (q - k <= 40) & (k <= q)) | (k < 3)
    ),
    seq_lengths=(64, 96),
  )
  kinds = np.asarray(jax.jit(lambda x: x.kinds())(layout))
  np.testing.assert_array_equal(dense_of(mask)[0], kinds > 0)
  # Its transposed lists, made for the backward pass, are ours.
  ours = layouts.to_fa4(layout)["backward"]
  for theirs, name in (
    (mask.q_num_blocks, "mask_block_cnt"),
    (mask.full_q_num_blocks, "full_block_cnt"),
  ):
    np.testing.assert_array_equal(theirs.numpy()[0], ours[name])
  # And the same elements are attended, by its own evaluation.
  back = layouts.from_flex(
    *(
      x.numpy()
      for x in (
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
      )
    ),
    mask_fn=pattern,
    **SIZES,
  )
  dense = jax.jit(lambda x: x.to_dense())
  np.testing.assert_array_equal(dense(back)[0], dense(layout))


def test_its_own_block_mask_says_the_same():
  """Built there from a function, element by element."""
  mask = flex.create_block_mask(
    lambda b, h, q, k: (q >= k) & (q - k <= 20 + 10 * h),
    1,
    2,
    64,
    96,
    device="cpu",
    BLOCK_SIZE=(16, 32),
  )
  found = layouts.from_flex(
    mask.kv_num_blocks.numpy(),
    mask.kv_indices.numpy(),
    mask.full_kv_num_blocks.numpy(),
    mask.full_kv_indices.numpy(),
    mask_fn=layouts.PerHead(
      tuple(layouts.Causal() & layouts.Window(n) for n in (20, 30))
    ),
    **SIZES,
  )
  q, k = np.arange(64)[:, None], np.arange(96)[None, :]
  expected = [(q >= k) & (q - k <= n) for n in (20, 30)]
  dense = jax.jit(functools.partial(layouts.BlockLayout.to_dense))
  np.testing.assert_array_equal(dense(found)[0], expected)
