"""Core context attention: what it is at its ends, and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.by_hand import LAYER
from tests.cache.cases import Rope
from tokjax import budgets, recipes
from tokjax.attention import core
from tokjax.attention.causal import Causal
from tokjax.attention.core_context import CoreContext
from tokjax.cache.cores import Cores
from tokjax.cache.kv import KV
from tokjax.cache.retriever import Retriever
from tokjax.layer import Arrivals, Layer, Memory

N, LENGTHS = 21, (21, 14)
TURNED = Layer(heads=4, kv_heads=2, head_dim=4, rotary=Rope())


def text(seed=0, n=N):
  rng = np.random.default_rng(seed)
  draw = lambda h: jnp.asarray(rng.normal(size=(2, n, h, 4)), jnp.float32)
  position = jnp.broadcast_to(jnp.arange(n)[None], (2, n))
  valid = position < jnp.asarray(LENGTHS)[:, None]
  return Arrivals(2 * draw(4), draw(2), draw(2), position, valid)


def outputs(attend, a, layer=TURNED):
  run = lambda a: attend(layer, a, Memory.of(a), params={}, carry={})[0]
  out = jax.jit(run)(a)
  return np.where(a.valid[:, :, None, None], out, 0)


@pytest.mark.parametrize(
  "attend",
  [CoreContext(1, budgets.Count(3)), CoreContext(4, budgets.Count(N))],
  ids=["groups of one token", "a window of everything"],
)
def test_it_is_dense_at_its_ends(attend):
  a = text()
  np.testing.assert_allclose(
    outputs(attend, a), outputs(Causal(), a), rtol=1e-4, atol=1e-5
  )


def test_every_token_is_seen_once():
  """Queries of zeros weight all that they see alike."""
  n = 12
  one = jnp.eye(n)[None, :, None]
  real = jnp.ones((1, n), bool)
  a = Arrivals(0 * one, one, one, jnp.arange(n)[None], real)
  layer = dataclasses.replace(LAYER, head_dim=n)
  out = CoreContext(3, budgets.Count(4))(
    layer, a, Memory.of(a), params={}, carry={}
  )[0][0, :, 0]
  for i in range(n):
    early = max((i + 1 - 4) // 3, 0)
    rows = early + i + 1 - 3 * early
    want = np.zeros(n)
    want[: 3 * early], want[3 * early : i + 1] = 1 / 3, 1
    np.testing.assert_allclose(out[i], want / rows, rtol=1e-5)


def test_a_core_is_a_mean_that_its_last_query_weights():
  a, attend = text(), CoreContext(3)
  cut = lambda x: x[:, 3:6][:, None]
  keys, values = attend.cores(
    TURNED, a.q[:, 5][:, None], cut(a.k), cut(a.v), cut(a.position)
  )
  turn = TURNED.rotate
  turned, query = turn(a.k, a.position), turn(a.q, a.position)
  for h in range(4):
    x = np.asarray(turned[0, 3:6, h // 2] @ query[0, 5, h]) / 2
    w = np.exp(x) / np.exp(x).sum()
    np.testing.assert_allclose(
      keys[0, h // 2, h % 2, 0],
      w @ turned[0, 3:6, h // 2],
      rtol=1e-4,
      atol=1e-5,
    )
    np.testing.assert_allclose(
      values[0, h // 2, h % 2, 0], w @ a.v[0, 3:6, h // 2], rtol=1e-4,
      atol=1e-5,
    )  # fmt: skip


def test_blocks_of_queries_read_a_slice(monkeypatch):
  a, attend = text(), CoreContext(3, budgets.Share(0.2))
  whole = outputs(attend, a)
  monkeypatch.setattr(core, "BLOCK", 4)
  np.testing.assert_allclose(outputs(attend, a), whole, rtol=1e-4, atol=1e-5)


def test_gradients_reach_what_is_in_a_core_alone():
  a, attend = text(), CoreContext(3, budgets.Count(3))

  def last(k):
    b = dataclasses.replace(a, k=k)
    out = attend(TURNED, b, Memory.of(b), params={}, carry={})[0]
    return (out[0, -1] ** 2).sum()

  slope = jax.jit(jax.grad(last))(a.k)
  assert (np.abs(slope[0]).max(axis=(1, 2)) > 0).all()
  assert not np.any(slope[1])


def test_the_cache_holds_the_window_and_the_cores():
  a, attend, cache = text(), CoreContext(4, budgets.Count(4)), Cores()

  def of(cache, attend):
    def run(a):
      state = cache.init(TURNED, 2, N, 3)
      return cache.prefill(
        TURNED, state, a, attend=attend, params={}, carry={}, last=True
      )[1]

    return cache.bytes(TURNED, jax.jit(run)(a))

  got, dense = of(cache, attend), of(KV(), Causal())
  item = 2 * 4 * 4
  assert got.logical.tolist() == [
    item * (2 * 8 + 4 * (n // 4)) for n in LENGTHS
  ]
  assert got.physical < dense.physical


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match="group=0: must be 1 or more"):
    recipes.get("cca", group=0)
  attend = CoreContext()
  for cache, other, fix in (
    (KV(), attend, "use Cores"),
    (Retriever(), attend, "use KV"),
    (Cores(), Causal(), "use KV"),
  ):
    with pytest.raises(ValueError, match=fix):
      cache.check(TURNED, other, 8, 2)
