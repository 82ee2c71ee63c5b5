"""Attamba: where chunks end, who sees what, and what the cache holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.cases import QUICK, Rope
from tokjax import recipes
from tokjax.attention.causal import Causal
from tokjax.attention.multi_token_states import MultiTokenStates
from tokjax.cache.kv import KV
from tokjax.cache.multi_token import MultiTokenCache
from tokjax.layer import Arrivals, Layer, Memory

LAYER = Layer(0, 2, heads=2, kv_heads=1, head_dim=8, rotary=Rope())
N = 20
RNG = np.random.default_rng(0)
DRAW = lambda *shape: jnp.asarray(RNG.normal(size=(1, N, *shape)), jnp.float32)
TEXT = Arrivals(
  DRAW(2, 8), DRAW(1, 8), DRAW(1, 8), jnp.arange(N)[None],
  jnp.ones((1, N), bool), x=DRAW(8),
)  # fmt: skip


def test_chunks_end_where_the_card_says():
  """P = 8: 0, 7, 15 in the first layer, earlier in the ones above."""
  attend = MultiTokenStates(8)
  ends = lambda index, depth: [
    int(i)
    for i in attend.end(Layer(index, depth), jnp.arange(4))
    if i < N
  ]
  assert ends(0, 4) == [0, 7, 15]
  assert ends(1, 4) == [0, 5, 13]
  assert ends(3, 4) == [0, 1, 9, 17]
  assert ends(7, 8) == [0, 8, 16]
  every = MultiTokenStates(1)
  assert every.end(LAYER, jnp.arange(4)).tolist() == [0, 1, 2, 3]


def test_keep_turns_the_length_of_chunks():
  chunk = lambda keep: recipes.get("attamba", keep=keep).attend.chunk
  assert [chunk(x) for x in (1.0, 0.5, 0.25, 0.125, 0.3)] == [1, 2, 4, 8, 3]


def test_what_reaches_a_query():
  """Ends of chunks, which hold their own chunk alone, and the newest."""
  # With one tap the states alone bring tokens together, as they are drawn.
  attend = MultiTokenStates(4, lead=1, state=2, kernel=1)
  params = {"attend": attend.parameters(LAYER, 8, jax.random.key(0))}

  def loss(x, place):
    a = Arrivals(TEXT.q, TEXT.k, TEXT.v, TEXT.position, TEXT.valid, x=x)
    out = attend(LAYER, a, Memory.of(a), params=params, carry={})[0]
    return jnp.square(out[0, place]).sum()

  slope = jax.jit(jax.grad(loss), compiler_options=QUICK)(TEXT.x, 13)
  assert np.any(slope[0], axis=1).tolist() == [i <= 13 for i in range(N)]

  @jax.jit
  def keys(x):
    return attend.states(LAYER, params["attend"]["k"], x, jnp.arange(N))

  before, after = keys(TEXT.x[0]), keys(TEXT.x[0].at[5].add(1.0))
  moved = np.any(before != after, axis=(1, 2))
  # The chunk 4, 5, 6, 7, from the token that changed on.
  assert np.flatnonzero(moved).tolist() == [5, 6, 7]


def test_the_cache_holds_ends_of_chunks_and_the_newest_inputs():
  attend, cache = MultiTokenStates(4, lead=1, state=2), MultiTokenCache()
  made = attend.parameters(LAYER, 8, jax.random.key(0))

  def size(attend, cache, params):
    def run(a):
      return cache.prefill(
        LAYER, cache.init(LAYER, 1, N, 4), a, attend=attend, params=params,
        carry={}, last=True,
      )[1]  # fmt: skip

    return cache.bytes(LAYER, jax.jit(run, compiler_options=QUICK)(TEXT))

  got = size(attend, cache, {"attend": made})
  # Tokens 0, 3, 7, 11, 15 and 19 end chunks; five inputs of eight features.
  assert got.logical.tolist() == [4 * (2 * 8 * 6 + 8 * 5)]
  assert got.physical < size(Causal(), KV(), {}).physical


def test_bad_input_is_refused():
  for name in ("chunk", "state", "heads", "kernel"):
    with pytest.raises(ValueError, match=f"{name}=0: must be 1 or more"):
      recipes.get("attamba", **{name: 0})
  with pytest.raises(ValueError, match="lead=-1: must be 0 or more"):
    recipes.get("attamba", lead=-1)
  with pytest.raises(ValueError, match="heads=3: must divide hidden=8"):
    recipes.get("attamba", hidden=8, heads=3)
  attend = MultiTokenStates()
  with pytest.raises(ValueError, match="as many channels as the model, 12"):
    attend.parameters(LAYER, 12, jax.random.key(0))
  with pytest.raises(ValueError, match="use a model without a window"):
    attend.check(LAYER.replace(window=4), 8)
  with pytest.raises(ValueError, match=r"use MultiTokenCache\(\)"):
    KV().check(LAYER, attend, 8, 2)
  with pytest.raises(ValueError, match=r"use KV\(\)"):
    MultiTokenCache().check(LAYER, Causal(), 8, 2)
