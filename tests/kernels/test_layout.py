"""Layouts say what the masks they were built from say."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels import layout as layouts

Q_LEN, K_LEN = 22, 19
SIZES = {"block_q": 4, "block_k": 3}
LENGTHS = {"q_len": Q_LEN, "k_len": K_LEN}

_small = st.integers(0, 9)
leaf_patterns = st.one_of(
  st.builds(layouts.Causal, st.integers(-5, 5)),
  st.builds(layouts.Window, _small, _small),
  st.builds(layouts.Dilated, st.integers(1, 7)),
  st.builds(layouts.Sinks, _small),
  st.builds(layouts.Global, _small, st.integers(0, 20)),
  st.builds(layouts.Row, st.integers(1, 9)),
  st.builds(layouts.criss_cross, st.integers(1, 9)),
  st.just(layouts.Full()),
)
pattern_trees = st.recursive(
  leaf_patterns,
  lambda parts: st.one_of(
    st.builds(lambda a, b: a & b, parts, parts),
    st.builds(lambda a, b: a | b, parts, parts),
    st.builds(lambda a: ~a, parts),
  ),
  max_leaves=4,
)


def elements(pattern, q_len=Q_LEN, k_len=K_LEN):
  """A pattern's mask bool `[heads, q_len, k_len]`, by calling it."""
  q, k = np.arange(q_len)[:, None], np.arange(k_len)[None, :]
  return np.stack(
    [
      np.broadcast_to(pattern(h, q, k), (q_len, k_len))
      for h in range(pattern.heads)
    ]
  )


def block_counts(mask, block_q, block_k):
  """Visible pairs and all pairs of each block, `[..., rows, columns]`."""
  rows, columns = -(-mask.shape[-2] // block_q), -(-mask.shape[-1] // block_k)
  shown = np.zeros(mask.shape[:-2] + (rows, columns), int)
  size = np.zeros((rows, columns), int)
  for i, j in np.ndindex(rows, columns):
    part = mask[
      ..., i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k
    ]
    shown[..., i, j] = part.sum((-2, -1))
    size[i, j] = part.shape[-1] * part.shape[-2]
  return shown, size


@hypothesis.given(pattern_trees, st.integers(1, 9), st.integers(1, 9))
@hypothesis.settings(max_examples=100)
def test_block_kinds_never_hide_or_show_too_much(pattern, block_q, block_k):
  kinds = layouts.block_kinds(pattern, block_q, block_k, Q_LEN, K_LEN)
  shown, size = block_counts(elements(pattern), block_q, block_k)
  assert not np.any((kinds == 0) & (shown > 0))
  assert not np.any((kinds == 2) & (shown < size))


@hypothesis.given(leaf_patterns, st.integers(1, 9), st.integers(1, 9))
@hypothesis.settings(max_examples=100)
def test_block_kinds_of_single_patterns_are_exact(pattern, block_q, block_k):
  kinds = layouts.block_kinds(pattern, block_q, block_k, Q_LEN, K_LEN)
  shown, size = block_counts(elements(pattern), block_q, block_k)
  expected = np.where(shown == size, 2, np.where(shown > 0, 1, 0))
  if not isinstance(pattern, (layouts.patterns.Or, layouts.Dilated)):
    np.testing.assert_array_equal(kinds, expected)


@pytest.mark.parametrize(
  "pattern",
  [
    layouts.Causal() & layouts.Window(6) | layouts.Sinks(2),
    layouts.PerHead((layouts.Causal(-3), layouts.Full(), layouts.Dilated(3))),
    ~layouts.Row(5),
  ],
)
def test_patterns_and_functions_build_the_same_mask(pattern):
  expected = elements(pattern)

  @jax.jit
  def both():
    sizes = LENGTHS | SIZES
    return (
      layouts.from_pattern(pattern, **sizes).to_dense(),
      layouts.from_mask_fn(pattern, heads=pattern.heads, **sizes).to_dense(),
    )

  for found in both():
    np.testing.assert_array_equal(found, expected)


def test_a_long_pattern_builds_small_lists_quickly():
  pattern = layouts.Causal() & (layouts.Window(4096) | layouts.Sinks(128))
  layout = layouts.from_pattern(pattern, q_len=131072)
  assert layout.capacity == (32, 2)
  assert layout.transpose.full_index.shape == (1, 1024, 1023)
  assert int(jnp.sum(layout.dropped)) == 0


from_mask = functools.partial(layouts.from_mask, **SIZES)
masks = st.builds(
  lambda seed, density, blocky: _mask(seed, density, blocky),
  st.integers(0, 10**6),
  st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
  st.booleans(),
)


def _mask(seed, density, blocky):
  """bool `[2, 2, q_len, k_len]`, constant on blocks or not."""
  rng = np.random.default_rng(seed)
  mask = rng.random((2, 2, Q_LEN, K_LEN)) < density
  if blocky:
    coarse = rng.random((2, 2, 6, 7)) < 0.5
    coarse = np.repeat(np.repeat(coarse, 4, 2), 3, 3)[..., :Q_LEN, :K_LEN]
    mask = mask & coarse
  return mask


@jax.jit
def _through(mask):
  layout = from_mask(mask).with_transpose()
  return layout, layout.to_dense(), layout.kinds()


@hypothesis.given(masks)
def test_masks_come_back_and_transposes_agree(mask):
  layout, dense, kinds = _through(mask)
  np.testing.assert_array_equal(dense, mask)
  assert not np.any(layout.dropped)
  lists = jax.tree.map(np.asarray, layout.transpose)
  found = np.zeros(kinds.shape, int)
  for at in np.ndindex(lists.full_count.shape):
    *lead, j = at
    for i in lists.full_index[at][: lists.full_count[at]]:
      found[(*lead, i, j)] += 2
    for n in range(lists.partial_count[at]):
      i, t = lists.partial_index[at][n], lists.partial_slot[at][n]
      found[(*lead, i, j)] += 1
      assert layout.partial_index[(*lead, i, t)] == j
  np.testing.assert_array_equal(found, kinds)


@jax.jit
def _combined(a, b, ids):
  a, b = from_mask(a), from_mask(b)
  window = layouts.from_pattern(
    layouts.Causal() & layouts.Window(7), **LENGTHS, **SIZES
  )
  segments = layouts.from_segments(ids, ids[:, :K_LEN], **SIZES)
  return [
    x.to_dense()
    for x in (
      a & b,
      a | b,
      a & window,
      a | window,
      window & segments,
      window | segments,
      a & segments,
      segments & segments,
      (a | b) & (window | a),
    )
  ]


@hypothesis.given(masks, masks, st.integers(0, 9))
def test_set_operations_are_those_of_the_masks(a, b, seed):
  ids = np.sort(np.random.default_rng(seed).integers(4, size=(2, Q_LEN)))
  w = elements(layouts.Causal() & layouts.Window(7))[None]
  s = (ids[:, :, None] == ids[:, None, :K_LEN])[:, None]
  expected = [
    a & b,
    a | b,
    a & w,
    a | w,
    w & s,
    w | s,
    a & s,
    s,
    (a | b) & (w | a),
  ]
  for found, wanted in zip(_combined(a, b, ids), expected, strict=True):
    np.testing.assert_array_equal(found, np.broadcast_to(wanted, found.shape))


PAIRS = [
  (layouts.Causal(), layouts.Window(4, 4)),
  (layouts.Full(), layouts.Dilated(4)),
  (layouts.PerHead((layouts.Sinks(5), layouts.Row(6))), layouts.Causal()),
]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_layouts_of_patterns_combine_like_patterns(a, b):
  c = layouts.Global(2, 8)

  @jax.jit
  def combined():
    x, y, z = (layouts.from_pattern(p, **LENGTHS, **SIZES) for p in (a, b, c))
    found = (x & y, (x | y) & z, (x & z) | y, (x | y) | (y & z))
    # Nothing is written out.
    assert all(layout.partial_mask is None for layout in found)
    return [layout.to_dense() for layout in found]

  expected = (a & b, (a | b) & c, (a & c) | b, (a | b) | (b & c))
  for found, wanted in zip(combined(), expected, strict=True):
    np.testing.assert_array_equal(found, elements(wanted))


@pytest.mark.parametrize("blocks", [-2, 1])
def test_shift_moves_keys_and_causal_cut_hides_the_future(blocks):
  mask, window = _mask(0, 0.5, True), layouts.Window(5, 2)

  @jax.jit
  def run(mask):
    made = (
      from_mask(mask),
      layouts.from_pattern(window, **LENGTHS, **SIZES),
      layouts.full(**LENGTHS, **SIZES),
    )
    return [
      (layouts.shift(x, blocks).to_dense(), layouts.causal_cut(x, 2).to_dense())
      for x in made
    ]

  dense = (mask, elements(window), elements(layouts.Full()))
  source = np.arange(K_LEN) - 3 * blocks
  inside = (source >= 0) & (source < K_LEN)
  for (moved, cut), whole in zip(run(mask), dense, strict=True):
    np.testing.assert_array_equal(
      moved, whole[..., np.clip(source, 0, K_LEN - 1)] & inside
    )
    np.testing.assert_array_equal(cut, whole & elements(layouts.Causal(2)))


def test_block_lists_of_other_libraries_come_back():
  layout = layouts.from_pattern(
    layouts.Causal() & layouts.Window(9), **LENGTHS, **SIZES
  )
  flex = layouts.to_flex(layout)
  assert flex["kv_indices"].shape == (1, 6, 7)
  forward = layouts.to_fa4(layout)["forward"]
  sizes = {"mask_fn": layout.mask_fn} | LENGTHS | SIZES
  dense = jax.jit(lambda layout: layout.to_dense())
  for back in (
    layouts.from_flex(**flex, **sizes),
    layouts.from_fa4(**forward, **sizes),
  ):
    np.testing.assert_array_equal(dense(back), dense(layout))
  backward = layouts.to_fa4(layout)["backward"]
  assert backward["full_block_idx"].shape == (1, 7, 6)
  # Theirs may call the cut-off last block full; ours must not.
  full = np.full((1, 6), 7)
  index = np.broadcast_to(np.arange(7)[::-1], (1, 6, 7))
  ours = layouts.from_flex(
    np.zeros_like(full), index, full, index, **LENGTHS, **SIZES
  )
  assert np.asarray(ours.kinds())[..., -1].max() == 1
  assert np.asarray(dense(ours)).all()


def test_capacity_density_and_pictures():
  mask = np.ones((1, Q_LEN, K_LEN), bool)
  layout = layouts.from_mask(mask, full_capacity=4, **SIZES)
  np.testing.assert_array_equal(layout.dropped, [6 * 2])
  np.testing.assert_allclose(layout.density(), [5 / 7])
  assert layouts.picture(layout).shape == (1, 6, 7)
  assert layouts.picture(layout, (60, 70)).shape == (1, 60, 70)
  with pytest.raises(ValueError, match="differ in block_q"):
    layout & layouts.from_mask(mask, block_q=5, block_k=3)
