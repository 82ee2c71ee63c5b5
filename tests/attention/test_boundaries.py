"""DHSA: where chunks end, what they are represented by, what is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokjax import budgets, recipes
from tokjax.attention import boundaries
from tokjax.attention.causal import Causal
from tokjax.attention.dynamic_chunks import DynamicChunks
from tokjax.layer import LOSSES, Arrivals, Layer, Memory


def greedy(score, may, apart, forced, most):
  """The best places one after the other, none too near an earlier one."""
  chosen = [forced]
  for i in np.argsort(-score, kind="stable"):
    if len(chosen) == most:
      break
    if may[i] and i < forced and all(abs(i - j) > apart for j in chosen):
      chosen.append(i)
  return np.isin(np.arange(len(score)), chosen)


def test_ends_are_those_of_a_greedy_search():
  rng = np.random.default_rng(0)
  found = jax.jit(boundaries.ends, static_argnames="apart")
  for most in (1, 4, 40):
    score = rng.integers(0, 30, size=60).astype(np.float32)  # With ties.
    may = rng.random(60) < 0.8
    got = found(score, may, apart=2, forced=50, most=most)
    np.testing.assert_array_equal(got, greedy(score, may, 2, 50, most))


def test_contrast_compares_what_later_tokens_look_at():
  rng = np.random.default_rng(0)
  n, length, w = 14, 12, 2
  attention = np.tril(rng.random((n, n))).astype(np.float32)
  attention[length:] = 99.0  # Padding.
  got = boundaries.contrast(jnp.asarray(attention), jnp.int32(length), w)
  for i in range(n):
    if not w - 1 <= i < length - w:
      assert got[i] == 0
      continue
    rows = attention[i + w : length]
    sides = rows[:, i - w + 1 : i + 1].sum(), rows[:, i + 1 : i + 1 + w].sum()
    np.testing.assert_allclose(got[i], max(sides) / min(sides), rtol=1e-4)


def test_chunks_are_represented_by_sums_over_roots_of_their_sizes():
  attend = DynamicChunks(block=2, exact=1)
  k = np.zeros((6, 1, 2), np.float32)
  k[:4, 0], k[4:, 0] = [3, 0], [0, 5]
  q = np.ones((6, 1, 2), np.float32)
  starts = jnp.asarray([0, 0, 0, 0, 1, 0], bool)
  got = attend.scores(jnp.asarray(q), jnp.asarray(k), starts, jnp.int32(5))
  # Four equal keys count twice; one of the two others is padding. The last
  # block has no query that is routed.
  row = np.array([6, 6, 6, 6, 5, 5]) * np.sqrt(2)
  np.testing.assert_allclose(got, [row, row, 0 * row], rtol=1e-6)


def test_the_first_tokens_take_the_places_of_the_first_chosen_ones():
  attend = DynamicChunks(block=4, first=2, near=2)
  score = jnp.asarray([0, 9, 1, 8, 0, 7, 0, 0, 99], jnp.float32)
  index, valid = attend.choose(
    score, jnp.int32(1), jnp.int32(9), most=6, count=jnp.int32(5)
  )
  # Chosen are 1, 3, 5, 6, 7, of which 0 and 1 replace the first two.
  assert index[valid].tolist() == [0, 1, 5, 6, 7]


def segments(seed, texts, n=48, channels=4):
  """Keys of texts whose segments have one direction each, and their ends."""
  rng = np.random.default_rng(seed)
  keys, ends = np.zeros((texts, n, channels), np.float32), np.zeros((texts, n))
  for b in range(texts):
    at = 0
    while at < n:
      size = int(rng.integers(6, 12))
      keys[b, at : at + size] = rng.normal(size=channels)
      at += size
      ends[b, min(at, n) - 1] = 1
  return keys + 0.2 * rng.normal(size=keys.shape).astype(np.float32), ends


def test_the_predictor_learns_where_segments_end():
  """On texts that it has not seen; untrained it is at chance."""
  keys, ends = segments(0, 8)
  mask = boundaries.inside(jnp.int32(48), 48, 4)
  score = jax.vmap(boundaries.logits, (None, 0, None))

  def loss(params):
    each = jax.vmap(boundaries.focal_loss, (0, 0, None))
    return each(score(params, keys, 4), ends, mask).mean()

  optimiser = optax.adam(1e-2)

  @jax.jit
  def trained(params):
    def step(carry, _):
      params, state = carry
      update, state = optimiser.update(jax.grad(loss)(params), state)
      return (optax.apply_updates(params, update), state), None

    start = (params, optimiser.init(params))
    return jax.lax.scan(step, start, None, length=40)[0][0]

  unseen, known = segments(99, 8)

  def separated(params):
    """How often the logit of an end is above that of another place."""
    logit = np.asarray(score(params, unseen, 4))[:, np.asarray(mask)]
    end = known[:, np.asarray(mask)] == 1
    return (logit[end][:, None] > logit[~end][None]).mean()

  params = boundaries.parameters(4, jax.random.key(1))
  assert separated(params) < 0.6
  assert separated(trained(params)) > 0.65


def test_the_loss_of_a_layer_is_that_of_its_attention():
  rng = np.random.default_rng(3)
  draw = lambda: jnp.asarray(rng.normal(size=(1, 12, 1, 4)), jnp.float32)
  real = jnp.ones((1, 12), bool)
  a = Arrivals(9 * draw(), draw(), draw(), jnp.arange(12)[None], real)
  layer, attend = Layer(head_dim=4), DynamicChunks(window=2, learns=True)
  params = {"attend": boundaries.parameters(4, jax.random.key(2))}

  @jax.jit
  def run(a):
    out, carry = attend(layer, a, Memory.of(a), params=params, carry={})
    dense = Causal()(layer, a, Memory.of(a), params={}, carry={})[0]
    weight = Causal().weights(layer, a, Memory.of(a))(jnp.arange(12))[0, 0, 0]
    return out - dense, carry[LOSSES]["boundaries"][0], weight

  off, loss, weight = run(a)
  assert not np.any(off)
  ratio = boundaries.contrast(weight, jnp.int32(12), 2)
  may = boundaries.inside(jnp.int32(12), 12, 2)
  assert 0 < (ratio[may] >= 2).sum() < may.sum()
  logit = boundaries.logits(params["attend"], a.k[0, :, 0], 2)
  target = (ratio >= 2).astype(jnp.float32)
  want = boundaries.focal_loss(logit, target, may)
  np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_options_are_refused():
  for name in ("block", "near", "window", "chunks_per_block"):
    with pytest.raises(ValueError, match=f"{name}=0: must be 1 or more"):
      recipes.get("dhsa", **{name: 0})
  with pytest.raises(ValueError, match="first=-1: must be 0 or more"):
    recipes.get("dhsa", first=-1)
  odd = Layer(0, 1, heads=1, kv_heads=1, head_dim=6)
  with pytest.raises(ValueError, match="1 key heads of 6 channels"):
    DynamicChunks(budgets.Count(9)).check(odd, 8)
