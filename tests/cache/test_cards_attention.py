"""The checks of the cards on attention: numbers that can be done by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.by_hand import (
  LAYER,
  arrivals,
  pairs,
  prompt_of,
  quick,
)
from tokjax import budgets, selection
from tokjax.attention import core, head_chunks
from tokjax.attention.block_memory import BlockMemory
from tokjax.attention.causal import Causal
from tokjax.attention.estimated import Antidiagonal, VerticalSlash
from tokjax.attention.head_chunks import HeadChunks
from tokjax.attention.landmark import grouped_softmax, with_landmarks
from tokjax.attention.linear import Linear, slopes
from tokjax.attention.per_head import PerHead, best_patterns, kept_mass
from tokjax.attention.probe_query import ProbeQuery
from tokjax.attention.recalibrate import Calibrated, FirstToken
from tokjax.attention.retrieval import Chunk
from tokjax.attention.soft_vote import SoftVote
from tokjax.attention.static import Band, Separators
from tokjax.cache.entries import Entries
from tokjax.cache.reads import Pages, Query, ReadAll
from tokjax.cache.shared_pages import SharedPages, selecting_layers
from tokjax.layer import Arrivals, Layer, Memory
from tokjax.models import Rotary


def test_quest_bounds_products():
  keys = np.array([[1.0, -2], [-1, 3]])
  read = Pages(budgets.Count(16))
  q = jnp.asarray([[2.0, -1]])
  bound = read.bound(q, jnp.asarray([keys.min(0)]), jnp.asarray([keys.max(0)]))
  assert bound.tolist() == [[4.0]]
  exact = read.bound(q, jnp.asarray(keys), jnp.asarray(keys))
  np.testing.assert_allclose(exact[0], keys @ [2, -1])


def test_bands():
  band = lambda total, **more: Band(1, budgets.Count(total), **more)
  assert pairs(band(3), 6).sum() == 15
  causal = np.tril(np.ones((6, 6), bool))
  np.testing.assert_array_equal(pairs(band(7), 6), causal)
  np.testing.assert_array_equal(pairs(band(3, dense=6), 6), causal)


def test_sepllm_sees_separators():
  attend = Separators((9,), 1, budgets.Count(2))
  seen = pairs(attend, 8, token=[0, 0, 0, 9, 0, 0, 0, 0])
  assert np.flatnonzero(seen[7]).tolist() == [0, 3, 6, 7]
  assert np.flatnonzero(seen[2]).tolist() == [0, 1, 2]
  every = pairs(attend, 8, token=[9] * 8)
  np.testing.assert_array_equal(every, np.tril(np.ones((8, 8), bool)))


def test_vertical_slash_finds_a_diagonal():
  n = 8
  rows = np.zeros((n, n))
  for i in range(n):
    rows[i, max(i - 3, 0)] = 1
  layer = dataclasses.replace(LAYER, head_dim=n)
  prompt = prompt_of(rows, layer)
  a = Arrivals(
    *(x[None] for x in (prompt.q, prompt.k, prompt.v, prompt.position,
                        prompt.valid))
  )  # fmt: skip
  attend = VerticalSlash(
    budgets.Count(1), budgets.Count(2), queries=4, sinks=0, near=1,
    least_vertical=1, least_slash=2, block=1,
  )  # fmt: skip
  vertical, slash = quick(lambda a: attend.mass(layer, a, Memory.of(a)), a)
  np.testing.assert_allclose([vertical.sum(), slash.sum()], 4, rtol=1e-5)
  _, distance = quick(lambda a: attend.chosen(layer, a, Memory.of(a)), a)
  assert np.flatnonzero(distance[0, 0]).tolist() == [0, 3]
  for block in (1, 2, 3):
    some = dataclasses.replace(attend, block=block).slashes(distance)[0, 0]
    apart = range(-(-n // block))
    wide = [any(abs(o - d * block) < block for o in (0, 3)) for d in apart]
    assert some.tolist() == wide
  wide = dataclasses.replace(attend, vertical=budgets.Count(n))
  np.testing.assert_array_equal(
    pairs(wide, n, layer=LAYER), np.tril(np.ones((n, n), bool))
  )


def test_xattention_sums_antidiagonals():
  layer = Layer(head_dim=1, scale=1.0)
  a = arrivals(2, width=1)
  a = dataclasses.replace(
    a, q=jnp.asarray([[[[1.0]], [[2.0]]]]), k=jnp.asarray([[[[3.0]], [[4.0]]]])
  )
  attend = Antidiagonal(stride=2, block=2)
  mass = quick(lambda a: attend.estimate(layer, a, Memory.of(a)), a)
  assert mass.tolist() == [[[[1.0]]]]
  tile = jnp.einsum("sd,sd->", a.q[0, ::-1, 0], a.k[0, :, 0])
  assert tile == 10
  mass = jnp.asarray([0.5, 0.3, 0.15, 0.05])
  forced = jnp.arange(4) % 3 == 0
  top = lambda share: np.flatnonzero(
    selection.top_mass(mass, share, forced=forced, mask=jnp.ones(4, bool))
  ).tolist()
  assert top(0.8) == [0, 1, 3]
  assert top(0.9) == [0, 1, 2, 3]


def test_landmark_weights():
  ln3 = math.log(3.0)
  near, far = grouped_softmax(
    jnp.asarray([0.0, 0.0]), jnp.asarray([True, False]),
    jnp.asarray([[0.0, ln3, 0.0]]), jnp.asarray([True]),
  )  # fmt: skip
  np.testing.assert_allclose(far, [[0.125, 0.375]], rtol=1e-6)
  np.testing.assert_allclose(near, [0.5, 0.0], rtol=1e-6)
  assert with_landmarks(jnp.arange(4), 9, 2).tolist() == [0, 1, 9, 2, 3, 9]


def test_tokenselect_lets_heads_vote_softly():
  layer = Layer(heads=3, kv_heads=3, head_dim=2)
  logits = jnp.asarray([[8.0, 0], [0, 3], [0, 3]])
  k = jnp.broadcast_to(jnp.eye(2)[:, None], (2, 3, 2))
  k = jnp.concatenate([k, k[:1]])  # One local token.
  chunk = Chunk(
    logits[None], jnp.asarray([2]), jnp.ones(1, bool), k, k, jnp.int32(3),
    jnp.int32(3),
  )  # fmt: skip
  attend = SoftVote(first=0, local=1, budget=budgets.Count(1), chunk=1)
  votes, _ = attend.vote(layer, chunk, logits)
  np.testing.assert_allclose(votes[:2], [1.09, 1.91], atol=0.01)


def test_longheads_represents_equal_keys_by_themselves():
  layer = Layer(head_dim=4)
  rng = np.random.default_rng(5)
  q, v = jnp.asarray(rng.normal(size=(2, 4, 1, 4)), jnp.float32)
  key = jnp.asarray(rng.normal(size=(1, 1, 4)), jnp.float32)
  k = jnp.broadcast_to(key, (4, 1, 4))
  attend = HeadChunks(budgets.Count(12), 4)
  chunk = Chunk(
    q, jnp.arange(4), jnp.ones(4, bool), k, v, jnp.int32(4), jnp.int32(4)
  )
  keys, _ = attend.digest(layer, chunk, (jnp.zeros((1, 1, 4)), q))
  np.testing.assert_allclose(keys, k[:1], rtol=1e-5)


def test_act_spreads_what_sinks_lose():
  attend = Calibrated(keep=0.4, spared=(0, 0))
  weight = jnp.asarray([0.1, 0.5, 0.4]).reshape(1, 1, 1, 1, 3)
  sinks = jnp.asarray([False, True, False]).reshape(1, 1, 1, 3)
  new = attend.spread(weight, sinks).reshape(-1)
  np.testing.assert_allclose(new, [0.16, 0.2, 0.64], rtol=1e-5)
  same = dataclasses.replace(attend, keep=1.0).spread(weight, sinks)
  np.testing.assert_allclose(same, weight)


def two_texts(seed: int, longer: int, shorter: int) -> Arrivals:
  """Drawn; four query heads, two key heads of 8 features."""
  rng, n = np.random.default_rng(seed), longer
  draw = lambda heads: jnp.asarray(rng.normal(size=(2, n, heads, 8)), "f4")
  real = jnp.arange(n)[None] < jnp.array([[n], [shorter]])
  position = jnp.broadcast_to(jnp.arange(n), (2, n))
  return Arrivals(draw(4), draw(2), draw(2), position, real)


def test_longheads_reads_the_same_fetched_or_by_products(monkeypatch):
  attend, n = HeadChunks(budgets.Count(5 * 16), 16), 190
  layer = Layer(heads=4, kv_heads=2, head_dim=8, rotary=Rotary(100.0))
  a = two_texts(1, n, 151)

  def run(wide, attend=attend):
    monkeypatch.setattr(head_chunks, "WIDE", wide)
    out, _ = attend(layer, a, Memory.of(a), params={}, carry={})
    return np.where(a.valid[:, :, None, None], out, 0)

  np.testing.assert_allclose(run(12), run(11), atol=2e-5)
  fewer = dataclasses.replace(attend, budget=budgets.Count(4 * 16))
  assert np.abs(run(12) - run(12, fewer)).max() > 0.1


def test_zerotuning_scales_the_first_weight():
  attend = FirstToken(gamma=2.0)
  logits = jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
  bias = attend.bias(LAYER, jnp.arange(3)[None, None])
  new = jax.nn.softmax(logits + bias.reshape(-1))
  np.testing.assert_allclose(new, [2 / 3, 0.2, 0.4 / 3], rtol=1e-5)


@pytest.mark.parametrize(
  "short, attends",
  [
    (24, [BlockMemory(2, 24, budgets.Count(x), 4, 2, 8) for x in (8, 16)]),
    (24, [ProbeQuery(2, 24, budgets.Count(x), 4, 2, 8) for x in (8, 16)]),
    # Three chunks are read in any case.
    (16, [HeadChunks(budgets.Count(x), 4) for x in (8, 12)]),
  ],
)
def test_budgets_that_come_to_the_same_make_one_program(short, attends):
  """So that a sweep asks them once."""
  layer = Layer(heads=4, kv_heads=2, head_dim=8, rotary=Rotary(100.0))

  def program(attend, n):
    def run(x):
      at, real = jnp.arange(n)[None], jnp.ones((1, n), bool)
      a = Arrivals(x, x[:, :, :2], x[:, :, :2], at, real)
      return attend(layer, a, Memory.of(a), params={}, carry={})

    return jax.jit(run).lower(jnp.ones((1, n, 4, 8))).as_text()

  one, other = (program(attend, short) for attend in attends)
  assert one == other
  far = dataclasses.replace(attends[0], budget=budgets.Count(20))
  assert program(far, 2 * short) != program(attends[0], 2 * short)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("heads", [None, (0, 3)])
def test_zerotuning_of_long_prompts_is_a_correction(heads, window, monkeypatch):
  """By rows of all keys and after dense attention; one text is shorter."""
  attend, n = FirstToken(3.0, heads), 90
  layer = Layer(
    heads=4, kv_heads=2, head_dim=8, window=window, soft_cap=5.0,
    rotary=Rotary(100.0),
  )  # fmt: skip
  a = two_texts(0, n, 51)

  def run(long, attend=attend):
    def loss(q):
      taken = dataclasses.replace(a, q=q)
      out, _ = attend(layer, taken, Memory.of(taken), params={}, carry={})
      out = jnp.where(a.valid[:, :, None, None], out, 0)
      return (out**2).sum(), out

    monkeypatch.setattr(core, "LONG", long)
    return jax.tree.leaves(jax.grad(loss, has_aux=True)(a.q))

  for got, expected in zip(run(16), run(1024), strict=True):
    np.testing.assert_allclose(got, expected, atol=3e-5)
  assert np.abs(run(16)[1] - run(16, Causal())[1]).max() > 0.1


def test_lightning_attention_decays():
  one = jnp.ones((1, 3, 1, 1))
  at, real = jnp.arange(3)[None], jnp.ones((1, 3), bool)
  a = Arrivals(one, one, one, at, real)
  attend = Linear(silu=False, norm=False)
  # The last layer of many decays by exp(-slope * 1e-5), almost not at all.
  last = Layer(index=1, depth=2, head_dim=1)
  out = attend.attention(last, a, None)
  np.testing.assert_allclose(out.reshape(-1), [1, 2, 3], rtol=1e-4)
  first = Layer(index=0, depth=2, head_dim=1)
  decay = math.exp(-slopes(1)[0] * (1 + 1e-5))
  out = attend.attention(first, a, None)
  expected = [1, 1 + decay, 1 + decay + decay**2]
  np.testing.assert_allclose(out.reshape(-1), expected, rtol=1e-5)
  assert len(slopes(6)) == 6


def test_lightning_attention_has_a_layer_norm_over_all_heads():
  rng = np.random.default_rng(7)
  out, scale, bias = rng.normal(size=(3, 2, 4)).astype(np.float32)
  out = out[None, None]
  attend, layer = Linear(), Layer(heads=2, head_dim=4)
  made = attend.parameters(layer, 6, jax.random.key(0))
  assert jax.tree.map(jnp.shape, made) == {"scale": (2, 4), "bias": (2, 4)}
  params = {"attend": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}}
  got = attend.finish(layer, jnp.asarray(out), arrivals(1), params)
  unit = (out - out.mean()) / np.sqrt(out.var() + 1e-5)
  np.testing.assert_allclose(got, unit * scale + bias, rtol=1e-5, atol=1e-6)


def test_top_mass_is_a_definition():
  """Adds in descending order while what is there is below the share."""
  rng = np.random.default_rng(6)
  for _ in range(5):
    mass = rng.random(7).astype(np.float32)
    mask, forced = rng.random((2, 7)) < 0.7
    share = float(rng.random())
    held, chosen_ = (
      (mass * (mask & forced)).sum(),
      set(np.flatnonzero(mask & forced)),
    )
    for j in np.argsort(-mass, kind="stable"):
      if mask[j] and j not in chosen_:
        if held >= share * (mass * mask).sum():
          break
        chosen_.add(int(j))
        held += mass[j]
    got = selection.top_mass(
      jnp.asarray(mass), share, forced=jnp.asarray(forced),
      mask=jnp.asarray(mask),
    )  # fmt: skip
    assert set(np.flatnonzero(got)) == chosen_


def test_causal_is_the_default():
  np.testing.assert_array_equal(
    pairs(Causal(), 5), np.tril(np.ones((5, 5), bool))
  )


FEW = budgets.Count(3)


@pytest.mark.parametrize(
  ("attend", "window"),
  [
    (Causal(), None),
    (Causal(), 6),
    (Band(3, budgets.Count(9)), None),
    (Band(3, budgets.Count(9)), 4),
    (Band(3, budgets.Count(9), reindexed=True), None),
    (Band(3, budgets.Count(9), reindexed=True), 4),
    (Band(0, budgets.Count(9), reindexed=True), None),
    (Antidiagonal(0.5, 2, 8), None),
    (VerticalSlash(FEW, FEW, 4, 1, 1, 1, 1, block=4), None),
    (VerticalSlash(budgets.Share(0.2), FEW, 4, 0, 0, 1, 1, block=8), None),
  ],
)
def test_blocks_that_a_kernel_reads_are_those_that_are_seen(attend, window):
  layer = Layer(
    heads=2, kv_heads=1, head_dim=8, window=window, rotary=Rotary(100.0)
  )
  a = arrivals(29, width=8, heads=2)
  a = dataclasses.replace(a, k=a.k[:, :, :1], v=a.v[:, :, :1])
  memory = Memory.of(a)

  def both(a, memory):
    layout = attend.layout(layer, a, memory)
    out, _ = attend(layer, a, memory, params={}, carry={})
    return out, attend.by_blocks(layer, layout, a, memory), layout.dropped

  rows, blocks, dropped = quick(both, a, memory)
  np.testing.assert_allclose(blocks, rows, rtol=1e-4, atol=1e-5)
  assert not dropped.any()


def test_heads_may_see_different_patterns():
  layer = Layer(heads=2, kv_heads=1, head_dim=4)
  a = arrivals(6, heads=2)
  a = dataclasses.replace(a, k=a.k[:, :, :1], v=a.v[:, :, :1])
  memory = Memory.of(a)
  patterns = (Band(1, budgets.Count(3)), Causal())
  attend = PerHead(patterns, ((0, 1),))
  attend.check(layer, 6)
  seen = np.asarray(attend.seen(layer, a, memory)(jnp.arange(6)))[0]
  assert [mask.sum() for mask in seen] == [15, 21]
  mass = kept_mass(Causal(), layer, a, memory, 2)
  np.testing.assert_allclose(mass, 1, rtol=1e-5)
  assert best_patterns(patterns, layer, a, memory, 2) == (1, 1)
  with pytest.raises(ValueError, match="choice=.*2 query heads"):
    PerHead(patterns, ((0,),)).check(layer, 6)
  with pytest.raises(ValueError, match="changes .'bias'"):
    PerHead((FirstToken(2.0),), ((0, 0),))


def test_delta_chooses_pages():
  """Sums over pages, the newest forced; ties go to the earlier page."""
  read = SharedPages(budgets.Count(4), page=2, newest=1, layers=(0,))
  pick = lambda weight: read.choose(
    jnp.asarray(weight), jnp.int32(len(weight)), 2, jnp.int32(2)
  )
  at, valid = pick([0.1, 0.2, 0.5, 0.0, 0.05, 0.05])
  assert at[valid].tolist() == [2, 3, 4, 5]
  at, valid = pick([0.2, 0.2, 0.2, 0.2, 0.1, 0.1, 0.0])
  assert at[valid].tolist() == [0, 1, 6]
  assert SharedPages(budgets.Count(4)).selecting(28) == (2, 14, 22)
  with pytest.raises(ValueError, match="page=0, newest=8"):
    SharedPages(budgets.Count(4), page=0)


def test_a_full_layer_chooses_pages_where_a_sliding_one_cannot():
  rng = np.random.default_rng(0)
  x = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
  entries = Entries(
    x(1, 1, 8, 2), x(1, 1, 8, 2), jnp.arange(8)[None, None], jnp.asarray([[8]])
  )
  read, q = SharedPages(budgets.Count(4), 2, 1, (0,)), x(1, 1, 1, 1, 2)

  def at(index, carry, window=None):
    layer = Layer(index, 3, head_dim=2, window=window)
    query = Query(layer, q, jnp.asarray([7]), Causal())
    dense = ReadAll()(query, entries, None, {})[0]
    out, weight, carry = read(query, entries, jnp.asarray([2]), carry)
    return jnp.allclose(out, dense), weight is not None, carry

  *read_all, carry = at(0, {}, window=3)
  assert read_all == [True, True]
  *read_all, carry = at(1, carry)
  assert read_all == [True, True]
  *read_all, _ = at(2, carry)
  assert read_all == [False, False]
  with pytest.raises(ValueError, match="no layer below chose pages"):
    at(2, {})


def test_layers_that_choose_are_where_attention_changes():
  maps = np.eye(12)[[0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]]  # At 4, 6, 9.
  maps[9:] += maps[8]  # A smaller change than the others.
  assert selecting_layers(jnp.asarray(maps), 3, apart=2) == (2, 4, 6)
  assert selecting_layers(jnp.asarray(maps), 3, apart=3) == (2, 6, 9)
  with pytest.raises(ValueError, match="count=4, apart=5: 12 layers"):
    selecting_layers(jnp.asarray(maps), 4, apart=5)
