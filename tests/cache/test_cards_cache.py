"""The checks of the cards on caches: numbers that can be done by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.by_hand import (
  LAYER,
  ROWS,
  evicted,
  keep,
  prompt_of,
  quick,
)
from tests.cache.cases import Rope
from tokjax import budgets
from tokjax.attention import core
from tokjax.attention.causal import Causal
from tokjax.cache import (
  kivi,
  low_rank,
  reads,
  retrieval_heads,
  shared,
  workspace,
)
from tokjax.cache import quantisation as few
from tokjax.cache import scores as importance
from tokjax.cache.adaptive import shares
from tokjax.cache.convolved import Convolved
from tokjax.cache.entries import Entries
from tokjax.cache.evict import evicting
from tokjax.cache.kivi import Kivi
from tokjax.cache.limits import Limits
from tokjax.cache.mixed import Mixed
from tokjax.cache.prompt import Prompt, over_prompts
from tokjax.layer import LSE, Arrivals, Layer, Memory
from tokjax.reduce.rules import KEEP_NEWEST


def test_h2o_sums_columns_and_never_normalises():
  mass = quick(lambda: importance.received(prompt_of(ROWS)))[0]
  np.testing.assert_allclose(mass, [1.8, 0.9, 0.8, 0.5], rtol=1e-5)
  assert keep(mass, 2, last=1) == [0, 3]


@pytest.mark.parametrize("window", [None, 6])
def test_sums_over_long_prompts_go_by_blocks(window, monkeypatch):
  """The same as row by row; padding at the end gives and takes nothing."""
  rng = np.random.default_rng(0)
  x = lambda heads: jnp.asarray(rng.normal(size=(150, heads, 8)), jnp.float32)
  at = jnp.arange(150)
  layer = Layer(
    heads=4, kv_heads=2, head_dim=8, rotary=Rope(), window=window, soft_cap=5.0
  )
  q, k, valid = x(4), x(2), at < 140
  prompt = Prompt(layer, q, at, valid, k, k, at, valid, None)
  rows = quick(lambda: importance.column_sums(prompt))
  monkeypatch.setattr(core, "LONG", 128)
  blocks = quick(lambda: importance.column_sums(prompt))
  np.testing.assert_allclose(blocks, rows, rtol=1e-4, atol=1e-6)
  # With what attention leaves, too.
  one = lambda x: x[None]
  a = Arrivals(one(q), one(k), one(k), one(at), one(valid))
  attend = lambda: Causal()(layer, a, Memory.of(a), params={}, carry={})[1]
  left = dataclasses.replace(prompt, lse=quick(attend)[LSE][0])
  blocks = quick(lambda: importance.column_sums(left))
  np.testing.assert_allclose(blocks, rows, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(rows.sum(), 4 * 140, rtol=1e-5)


def test_zipcache_divides_by_the_queries_that_see_a_key():
  layer = dataclasses.replace(LAYER, head_dim=3)
  every = Mixed(recent=1, random=20)
  score = quick(lambda: every.saliency(prompt_of(ROWS[:3, :3], layer)))[0]
  np.testing.assert_allclose(score, [1.7 / 3, 0.4, 0.5], rtol=1e-5)


def test_snapkv_pools_with_zeros_at_the_border():
  pool = lambda x, how: importance.pool(jnp.asarray(x, jnp.float32), 3, how)
  np.testing.assert_allclose(pool([0, 6, 0, 0, 0], "avg"), [2, 2, 2, 0, 0])
  np.testing.assert_allclose(pool([0, 6, 0, 0, 0], "max"), [6, 6, 6, 0, 0])
  np.testing.assert_allclose(pool([6, 0, 0], "avg"), [2, 2, 0])
  with pytest.raises(ValueError, match="kernel=4: must be odd"):
    importance.pool(jnp.zeros(3), 4, "avg")


def test_pyramidkv_counts():
  pyramid = budgets.Pyramid(budgets.Count(128), window=8)
  counts = [pyramid.count(10**6, layer, 32) - 8 for layer in range(32)]
  assert counts[0] == 234
  assert counts[31] == 17
  assert sum(counts) / 32 == 125.5
  assert counts == sorted(counts, reverse=True)
  assert pyramid.count(100, 3, 32) == 128, "a short prompt keeps all"
  assert pyramid.count(200, 3, 32) == 128, "below twice the budget all alike"


def test_adakv_shares():
  score = jnp.asarray([[0.9, 0.8, 0.7, 0.1], [0.3, 0.2, 0.1, 0.0]])
  of = lambda score, b, alpha: quick(
    lambda score: shares(
      score, jnp.ones(score.shape[1], bool), jnp.int32(b), score.size, alpha
    ),
    score,
  ).tolist()
  assert of(score, 2, 0.0) == [3, 1]
  assert of(score, 2, 0.2) == [2, 1]
  assert of(score, 2, 1.0) == [2, 2]
  n = jnp.arange(200.0)
  wide = jnp.stack([jnp.where(n < 150, 2.0, 0.0), jnp.where(n < 50, 1.0, 0)])
  assert of(wide, 100, 0.2) == [140, 60]


def test_received_attention_goes_by_position_where_tokens_were_removed(
  monkeypatch,
):
  """Kernels that tell distances by place must not be asked then."""
  monkeypatch.setattr(core, "LONG", 8)
  rng = np.random.default_rng(0)
  at = np.array([0, 1, 2, 9, 10, 11, 20, 21])
  layer = Layer(head_dim=4, window=4, rotary=Rope())
  q, k = jnp.asarray(rng.normal(size=(2, 1, 8, 1, 4)), jnp.float32)
  real = jnp.ones((1, 8), bool)
  arrivals = Arrivals(q, k, k, jnp.asarray(at)[None], real, gaps=True)

  def run(arrivals):
    space = workspace.start(layer, 1, 8, 0, window=None)
    space = workspace.add(space, arrivals)
    sums = over_prompts(layer, space, importance.column_sums)
    turn = lambda x: layer.rotate(x, arrivals.position)
    return sums, turn(arrivals.q), turn(arrivals.k)

  sums, q, k = quick(run, arrivals)
  logits = np.asarray(q)[0, :, 0] @ np.asarray(k)[0, :, 0].T * layer.factor
  apart = at[:, None] - at[None, :]
  weight = np.where((apart >= 0) & (apart < 4), np.exp(logits), 0)
  expected = (weight / weight.sum(axis=1, keepdims=True)).sum(axis=0)
  np.testing.assert_allclose(sums[0, 0, 0], expected, rtol=1e-4)


def test_knorm_keeps_short_keys():
  assert keep(-np.array([3, 1, 2, 5]), 2) == [1, 2]


def test_expected_attention_is_the_gaussian_moment():
  layer = Layer(head_dim=2, scale=1.0)
  q = jnp.asarray([[2.0, 0], [-2, 0]])[:, None]
  k = jnp.asarray([[1.0, 0], [0, 0]])[:, None]
  at, real = jnp.arange(2), jnp.ones(2, bool)
  prompt = Prompt(layer, q, at, real, k, k, at, real, None)
  options = dict(sinks=0, future=3, covariance=True, value_norm=False)
  score = quick(lambda: importance.expected(prompt, epsilon=0.0, **options))
  z = np.exp([2.0, 0.0])
  np.testing.assert_allclose(score[0], z / z.sum(), rtol=1e-5)


def test_a_mean_of_rotations_is_none():
  layer = Layer(head_dim=4, rotary=Rope())
  turn, one = quick(
    lambda start: [
      importance.mean_rotation(layer, start, steps) for steps in (16, 1)
    ],
    jnp.int32(9),
  )
  assert np.linalg.norm(turn @ np.ones(4)) < 2
  np.testing.assert_allclose(one @ one.T, np.eye(4), atol=1e-6)


def test_codes_are_packed_without_waste():
  rng = np.random.default_rng(1)
  for bits in (1, 3, 8):
    codes = jnp.asarray(rng.integers(0, 2**bits, (3, 16)), jnp.uint8)
    pack = lambda codes, bits=bits: few.pack(codes, bits)
    packed, again = quick(lambda c, p=pack: (p(c), few.unpack(p(c))), codes)
    assert packed.size * 8 == codes.size * bits
    np.testing.assert_array_equal(again, codes)


def test_kivi_counts_and_exact_groups():
  store = Kivi(bits=2, group=8, residual=128)
  layer = Layer(head_dim=8)
  k = jnp.broadcast_to((jnp.arange(300) % 4.0)[:, None], (300, 8))
  k = k.at[:, 5].set(7.0)  # A constant channel.
  entries = Entries(
    k[None, None], k[None, None], jnp.arange(300)[None, None],
    jnp.full((1, 1), 300),
  )  # fmt: skip
  packed = quick(lambda e: store.pack(layer, e, 310), entries)
  assert packed.k_bits.shape[-3] == 256
  assert packed.v_bits.shape[-3] == 310 - 128
  view = quick(lambda packed: store.view(layer, packed), packed)
  np.testing.assert_allclose(view.k[0, 0, :300], k, atol=1e-6)
  exact = (300 - 256 + 128) * 8 * 4
  coded = (256 + 172) * (8 * 2 / 8 + 2 * 4)
  assert store.logical(layer, packed)[0] == exact + coded + 300 * 4
  code = lambda k: few.unpack(store.coded_keys(k, jnp.float32)[0])
  loud, quiet = quick(lambda k: (code(k.at[:, 2].mul(1e4)), code(k)), k[:8])
  others = [0, 1, 3, 4, 5, 6, 7]
  np.testing.assert_array_equal(loud[:, others], quiet[:, others])


@pytest.mark.parametrize("bits", [2, 3])
def test_kivi_reads_in_parts_what_it_shows(bits, monkeypatch):
  """Ragged, down to fewer entries than stay exact."""
  monkeypatch.setattr(kivi, "PART", 64)
  store = Kivi(bits, group=8, residual=32)
  layer = Layer(heads=4, kv_heads=2, head_dim=16)
  rng = np.random.default_rng(2)
  k, v = jnp.asarray(rng.normal(size=(2, 4, 2, 300, 16)), jnp.float32)
  length = jnp.asarray([[300] * 2, [211] * 2, [40] * 2, [5] * 2])
  entries = Entries(
    k, v, jnp.broadcast_to(jnp.arange(300), k.shape[:3]), length
  )
  q = jnp.asarray(rng.normal(size=(4, 2, 2, 1, 16)), jnp.float32)
  query = reads.Query(layer, q, length[:, 0], Causal())

  def both(entries):
    state = store.pack(layer, entries, 310)
    parts = store.parts(layer, state)
    assert parts.count == 5
    whole, _, _ = reads.ReadAll()(query, store.view(layer, state), None, {})
    return reads.in_parts(query, parts), whole

  parts, whole = quick(both, entries)
  np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_razor_compensation_is_exact_for_equal_tokens():
  """Six tokens, the middle four alike: one mean that counts for four."""
  rng = np.random.default_rng(2)
  k, v = rng.normal(size=(2, 6, 4))
  k[1:5], v[1:5] = k[1], v[1]
  q = rng.normal(size=4)

  ends = dict(first=1, last=1, merge=True)
  few = evicted(evicting(KEEP_NEWEST, budgets.Count(2), **ends), k, v)
  small, values, count = map(np.asarray, (few.k, few.v, few.extra["count"]))
  assert few.length == 3
  assert count.tolist() == [1, 4, 1]
  full, merged = np.exp(k @ q), np.exp(small @ q) * count
  np.testing.assert_allclose(
    merged @ values / merged.sum(), full @ v / full.sum(), rtol=1e-5
  )


def test_pod_groups_similar_layers():
  same, other = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.0, 1.0])
  np.testing.assert_allclose(shared.similarity(same, same), 1)
  np.testing.assert_allclose(shared.similarity(same, other), 0)
  layers = np.stack([[same, same], [same, other], [same, other]])
  assert shared.leaders(layers) == ((0, 0), (0, 1), (0, 1))


def test_cskv_factors_lose_the_smallest_singular_values():
  weight = np.random.default_rng(3).normal(size=(6, 5)).astype(np.float32)
  made = low_rank.factors(jnp.asarray(weight), 3)
  error = np.square(made["down"] @ made["up"] - weight).sum()
  values = np.linalg.svd(weight, compute_uv=False)
  np.testing.assert_allclose(error, np.square(values[3:]).sum(), rtol=1e-4)
  scale = jnp.arange(1.0, 7.0)
  whole = low_rank.factors(jnp.asarray(weight), 5, scale)
  np.testing.assert_allclose(whole["down"] @ whole["up"], weight, atol=1e-5)


def test_lococo_weights():
  cache = Convolved(slots=4, slack=0, block=4, kernel=3)
  layer = Layer(head_dim=2)
  made = cache.parameters(layer, 2, jax.random.key(0))
  x = np.random.default_rng(4).normal(size=(2, 6, 2)).astype(np.float32)
  k, v = jnp.asarray(x)
  valid = jnp.arange(6) < 5
  w = cache.weights(k, v, valid, made)
  assert w.shape == (2, 6)
  np.testing.assert_allclose(w.sum(axis=1), 1, rtol=1e-5)
  assert (np.asarray(w) >= 0).all()
  assert not np.asarray(w)[:, 5].any()
  entries = Entries(k, v, jnp.arange(6), jnp.int32(6))
  score = jnp.asarray([1.0, 6, 2, 5, 3, 4])
  kept = cache.merge(entries, score, {**made, "mix": jnp.float32(0)})
  assert kept.length == 4
  np.testing.assert_allclose(kept.k, np.asarray(k)[[1, 3, 4, 5]], rtol=1e-6)


def test_streaming_keeps_the_first_and_the_last():
  reduce = evicting(KEEP_NEWEST, budgets.Count(12), first=4, last=1)
  count, _ = Limits.of(reduce, LAYER, 20).at(jnp.asarray([20]))
  kept = keep(np.arange(20.0), int(count[0]), first=4, last=1)
  assert kept == [0, 1, 2, 3, *range(12, 20)]


def test_razor_finds_heads_that_look_back():
  """Period 3 shown twice: head 0 looks at copies, head 1 after them."""
  attention = np.zeros((1, 4, 6, 6))
  attention[:, 2:, :, 0] = 1
  for i in range(6):
    attention[0, 0, i, max(i - 3, 0)] = 1
    attention[0, 1, i, max(i - 2, 0)] = 1
  echo, induction = retrieval_heads.echo_and_induction(attention, 3)
  np.testing.assert_allclose(echo[0, :2], [1, 0])
  np.testing.assert_allclose(induction[0, :2], [0, 1])
  heads = retrieval_heads.retrieval_heads(echo, induction, 2)
  assert heads == ((0,),)
  with pytest.raises(ValueError, match="no second copy"):
    retrieval_heads.echo_and_induction(attention, 4)
