"""Masks of tables and web pages, counted by hand and next to loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_sparse_attention
from pallas_kernels import layout as layouts
from tokjax.attention import structural


def shown(pattern, n):
  at = np.arange(n)
  return np.asarray(pattern(0, at[:, None], at[None]))


def test_prefix_global_pairs():
  seen = shown(structural.prefix_global(2, 1), 6)
  assert seen.sum() == 30
  assert seen[:2].all()
  assert seen[:, :2].all()
  assert np.flatnonzero(seen[3]).tolist() == [0, 1, 2, 3, 4]
  assert np.flatnonzero(seen[5]).tolist() == [0, 1, 4, 5]
  assert shown(structural.prefix_global(6, 0), 6).all()
  assert shown(structural.prefix_global(0, 6), 6).all()


def test_prefix_global_attention_skips_what_is_hidden():
  rng, n = np.random.default_rng(0), 64
  q, k, v = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(3, n, 2, 4)))
  pattern = structural.prefix_global(8, 4)
  layout = layouts.from_pattern(pattern, q_len=n, block_q=8, block_k=8)
  got = jax.jit(block_sparse_attention)(q, k, v, layout)
  x = np.einsum("ihd,jhd->hij", q, k) / 2
  x = np.where(shown(pattern, n), x, -np.inf)
  w = np.exp(x - x.max(-1, keepdims=True))
  want = np.einsum("hij,jhd->ihd", w / w.sum(-1, keepdims=True), v)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  assert int((layout.full_count + layout.partial_count).sum()) < 64


def test_rows_and_columns_of_a_small_table():
  row, column = jnp.asarray([0, 1, 1, 2]), jnp.asarray([0, 1, 2, 1])
  text = jnp.asarray([True, False, False, False])
  seen = structural.table_mask(
    row, column, text, jnp.ones(4, bool), heads=3, row_heads=1
  )
  sees = lambda h, i: np.flatnonzero(seen[h, i]).tolist()
  assert sees(0, 1) == [0, 1, 2]
  assert sees(1, 1) == sees(2, 1) == [0, 1, 3]
  assert seen[:, 0].all()
  assert seen.sum(axis=(1, 2)).tolist() == [12, 12, 12]


def table(seed, n, questions=3):
  """Tokens of a question and of cells, shuffled among the cells."""
  rng = np.random.default_rng(seed)
  row, column = rng.integers(1, 5, n), rng.integers(1, 4, n)
  text = np.arange(n) < questions
  row, column = np.where(text, 0, row), np.where(text, 0, column)
  x = rng.normal(size=(3, n, 3, 4)).astype(np.float32)
  return [*x, row, column, text, np.ones(n, bool)]


def by_hand(q, k, v, row, column, text, valid, row_heads, bucket, header):
  """Pairs one by one, as the official mask has them."""
  n, heads, d = q.shape
  out = np.zeros(q.shape)
  for h in range(heads):
    ids = row if h < row_heads else column
    order = sorted(range(n), key=lambda i: (ids[i] + 10000 * (not valid[i])))
    of = lambda rank: max((rank - header) // bucket + 1, 0)
    number = {i: of(rank) for rank, i in enumerate(order)}
    for i in range(n):
      seen = [
        j
        for j in range(n)
        if valid[j]
        and (ids[i] == ids[j] or text[i] or text[j])
        and (abs(number[i] - number[j]) <= 1 or 0 in (number[i], number[j]))
      ]
      if seen:
        x = np.array([q[i, h] @ k[j, h] for j in seen]) / np.sqrt(d)
        w = np.exp(x - x.max())
        out[i, h] = w @ v[seen, h] / w.sum()
  return out


@pytest.mark.parametrize(("bucket", "header"), [(4, 3), (4, 6), (32, 3)])
def test_sorted_buckets_are_the_mask_padded_and_alone(bucket, header):
  """A bucket that holds everything hides nothing."""
  lengths, n = (17, 11), 17
  alone = [table(i, m) for i, m in enumerate(lengths)]
  fill = lambda x: np.concatenate(
    [x, np.full((n - len(x), *x.shape[1:]), 1, x.dtype)]
  )
  rows = [[fill(x) for x in one] for one in alone]
  for one, m in zip(rows, lengths, strict=True):
    one[-1] = np.arange(n) < m
  batch = [jnp.asarray(np.stack(x)) for x in zip(*rows, strict=True)]
  run = lambda *x: structural.table_attention(
    *x, row_heads=1, bucket=bucket, header=header
  )
  got = jax.jit(jax.vmap(run))(*batch)
  masked = jax.vmap(
    lambda *x: structural.table_mask(
      *x, heads=3, row_heads=1, bucket=bucket, header=header
    )
  )(*batch[3:])
  for i, (one, m) in enumerate(zip(alone, lengths, strict=True)):
    want = by_hand(*one, 1, bucket, header)
    np.testing.assert_allclose(got[i, :m], want, rtol=1e-4, atol=1e-5)
    x = np.einsum("ihd,jhd->hij", one[0], one[1]) / 2
    x = np.where(masked[i, :, :m, :m], x, -np.inf)
    w = np.exp(x - x.max(-1, keepdims=True))
    out = np.einsum("hij,jhd->ihd", w / w.sum(-1, keepdims=True), one[2])
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)


def test_gradients_go_along_rows_and_columns():
  given = [jnp.asarray(x) for x in table(0, 9)]

  def one(v):
    out = structural.table_attention(
      *given[:2], v, *given[3:], row_heads=1, bucket=4
    )
    return (out[8] ** 2).sum(axis=-1)

  slope = jax.jit(jax.jacobian(one))(given[2])
  assert np.isfinite(slope).all()
  reached = np.abs(slope).max(axis=-1) > 0
  row, column, text = (np.asarray(x) for x in given[3:6])
  assert reached[0, :, 0].tolist() == ((row == row[8]) | text).tolist()
  assert reached[2, :, 2].tolist() == ((column == column[8]) | text).tolist()


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match="radius=-1: must be 0 or more"):
    structural.prefix_global(1, -1)
  given = [jnp.asarray(x) for x in table(0, 4)]
  with pytest.raises(ValueError, match=r"row_heads=4: must lie in 0\.\.3"):
    structural.table_mask(*given[3:], heads=3, row_heads=4)
  with pytest.raises(ValueError, match="bucket=0: must be 1 or more"):
    structural.table_attention(*given, row_heads=1, bucket=0)


def test_a_translation_sees_registers_and_what_came_before():
  kind = np.array([0, 0, 0, 1, 1, 1, 2, 2])
  source, register = jnp.asarray(kind == 0), jnp.asarray(kind == 1)
  seen = structural.register_mask(source, register, jnp.ones(8, bool))
  assert seen.sum(axis=1).tolist() == [3, 3, 3, 6, 6, 6, 4, 5]
  assert not seen[6:, :3].any()
  # What is two steps away goes through registers, and through nothing else.
  cut = np.array(seen)
  cut[3:6, :3] = False
  reach = lambda m: np.linalg.matrix_power(m.astype(int), 8) > 0
  assert reach(np.array(seen))[6:, :3].all()
  assert not reach(cut)[6:, :3].any()
  # Padding on the left, as the official batches have it.
  valid = jnp.arange(9) > 0
  padded = structural.register_mask(
    jnp.asarray(np.append(True, kind == 0)),
    jnp.asarray(np.append(False, kind == 1)), valid,
  )  # fmt: skip
  np.testing.assert_array_equal(padded[1:, 1:], seen)
  assert not padded[0].any()
  assert not padded[:, 0].any()
  assert structural.registers(jnp.asarray([1, 4, 5]), 2).tolist() == [1, 2, 3]
  with pytest.raises(ValueError, match="factor=0: must be 1 or more"):
    structural.registers(jnp.asarray([1]), 0)
