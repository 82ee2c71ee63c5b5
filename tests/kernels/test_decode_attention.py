"""Decode attention against the float64 formulas and itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention
from pallas_kernels.decode_attention import merge
from tests.kernels import oracle

B, T, H, G, N, D = 3, 2, 6, 2, 53, 16
LENGTHS = np.array([53, 17, 0])


def setting(dtype=np.float32):
  rng = np.random.default_rng(0)
  draw = lambda *shape: np.asarray(jnp.asarray(rng.normal(size=shape), dtype))
  return rng, draw(B, T, H, D), draw(B, N, G, D), draw(B, N, G, 8)


def choice(kind, rng):
  """Arguments of a selection, and its mask `[b, H, n]`."""
  shown = np.zeros((B, G, N), bool)
  if kind == "all":
    return {}, np.ones((B, H, N), bool)
  size, total = (16, 4) if kind == "blocks" else (1, N)
  listed = np.stack(
    [[rng.permutation(total)[:3] for _ in range(G)] for _ in range(B)]
  )
  counts = np.array([[3, 2], [1, 3], [2, 0]])
  for b, g in np.ndindex(B, G):
    for j in listed[b, g][: counts[b, g]]:
      shown[b, g, j * size : (j + 1) * size] = True
  return {kind: listed, "counts": counts}, np.repeat(shown, H // G, 1)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("kind", ["all", "blocks", "tokens"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_way_of_reading(kind, causal, implementation):
  rng, q, k, v = setting()
  selection, shown = choice(kind, rng)
  bias = rng.normal(size=(B, H, N)).astype(np.float32)
  sinks = rng.normal(size=H).astype(np.float32) if causal else None
  end = LENGTHS[:, None] - np.arange(T - 1, -1, -1) * causal
  mask = shown[:, :, None] & (np.arange(N) < end[..., None])[:, None]
  out, lse = oracle.attention(
    q, k, v, mask, bias=bias, sinks=sinks, soft_cap=5.0
  )
  for splits in (1, 3):
    run = jax.jit(
      functools.partial(
        decode_attention,
        block_size=16,
        causal=causal,
        soft_cap=5.0,
        splits=splits,
        return_lse=True,
        implementation=implementation,
      )
    )
    found = run(q, k, v, lengths=LENGTHS, bias=bias, sinks=sinks, **selection)
    np.testing.assert_allclose(found[0], out, atol=1e-5)
    np.testing.assert_allclose(found[1], lse, atol=1e-5)


def test_half_precision_vmap_and_garbage_beyond_the_length():
  _, q, k, v = setting(jnp.bfloat16)
  run = jax.jit(functools.partial(decode_attention, block_size=16))
  found = run(q, k, v, lengths=LENGTHS)
  assert found.dtype == jnp.bfloat16
  beyond = (np.arange(N) >= LENGTHS[:, None])[..., None, None]
  spoilt = [np.where(beyond, np.asarray(7e4, x.dtype), x) for x in (k, v)]
  np.testing.assert_array_equal(run(q, *spoilt, lengths=LENGTHS), found)
  one = lambda q, k, v, n: decode_attention(q, k, v, lengths=n, block_size=16)
  np.testing.assert_array_equal(jax.jit(jax.vmap(one))(q, k, v, LENGTHS), found)


def test_merging_parts_is_attention_over_their_union():
  _, q, k, v = setting()
  run = jax.jit(
    functools.partial(decode_attention, return_lse=True, block_size=16)
  )
  halves = [
    run(q, k[:, part], v[:, part]) for part in (slice(0, 20), slice(20, N))
  ]
  outs = jnp.stack([jnp.swapaxes(out, 1, 2) for out, _ in halves])
  join = jax.jit(merge)
  out, lse = join(outs, jnp.stack([lse for _, lse in halves]))
  expected = run(q, k, v)
  np.testing.assert_allclose(jnp.swapaxes(out, 1, 2), expected[0], atol=1e-5)
  np.testing.assert_allclose(lse, expected[1], atol=1e-5)
  empty = join(outs, jnp.full(outs.shape[:-1], -jnp.inf))
  assert not np.any(empty[0])
  assert np.isneginf(empty[1]).all()


def test_wrong_calls_raise():
  _, q, k, v = setting()
  listed = np.zeros((B, G, 1), int)
  with pytest.raises(ValueError, match="not both"):
    decode_attention(q, k, v, blocks=listed, tokens=listed)
  with pytest.raises(ValueError, match="needs blocks or tokens"):
    decode_attention(q, k, v, counts=listed[..., 0])
  with pytest.raises(ValueError, match="exceeds the cache"):
    decode_attention(q, k, v, blocks=listed, block_size=64)
  with pytest.raises(ValueError, match="allowed: None"):
    decode_attention(q, k, v, implementation="cudnn")
