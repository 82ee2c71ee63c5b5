"""LeMo: what blocks have to do with each other, and what becomes of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.cases import QUICK, Rope
from tokjax import budgets, recipes
from tokjax.attention import eliminated
from tokjax.attention.causal import Causal
from tokjax.attention.eliminated import Eliminated
from tokjax.layer import LOSSES, Arrivals, Layer, Memory

LAYER = Layer(heads=2, kv_heads=1, head_dim=4, rotary=Rope())
N, S = 10, 3
RNG = np.random.default_rng(0)
DRAW = lambda *shape: jnp.asarray(RNG.normal(size=(1, N, *shape)), jnp.float32)
TEXT = Arrivals(
  DRAW(2, 4), DRAW(1, 4), DRAW(1, 4), jnp.arange(N)[None],
  jnp.ones((1, N), bool), x=DRAW(8),
)  # fmt: skip
SMALL = {"block": S, "hidden": 4, "from_layer": 0, "to_end": True}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def run(attend, a=TEXT, params=None):
  made = {} if params is None else {"attend": params}
  return attend(LAYER, a, Memory.of(a), params=made, carry={})


def pair(i, j, causal):
  """The card: positive logits are summed over heads, then the largest."""
  found = [0.0]
  for a in range(i * S, min(i * S + S, N)):
    for b in range(j * S, min(j * S + S, N)):
      if b <= a or not causal:
        x = np.asarray(TEXT.q[0, a] @ TEXT.k[0, b, 0])
        found.append(np.maximum(x, 0).sum())
  return max(found)


def test_pairs_of_blocks_are_measured():
  q, k = (jnp.pad(x[0], [(0, 2), (0, 0), (0, 0)]) for x in (TEXT.q, TEXT.k))
  for causal in (True, False):
    got = eliminated.measured(q, k, S, causal)
    want = [[pair(i, j, causal) for j in range(4)] for i in range(4)]
    np.testing.assert_allclose(got, want, rtol=1e-5)
  two = eliminated.measured(
    jnp.asarray([[[2.0], [-4.0]]]), jnp.ones((1, 1, 1)), 1, False
  )
  assert two.tolist() == [[2.0]]


def test_measured_scores_count_a_block_as_query_and_as_key():
  attend = Eliminated(predicts=False, **SMALL)
  got = jax.jit(lambda a: attend.scores(LAYER, a, None))(TEXT)[0]
  want = [
    sum(pair(i, j, True) for i in range(j, 4))
    + sum(pair(j, i, True) for i in range(j))
    for j in range(4)
  ]
  np.testing.assert_allclose(got, np.array(want) / 2, rtol=1e-5)


def test_what_goes_gets_nothing_and_is_not_seen():
  attend = Eliminated(budgets.Share(0.7), predicts=False, **SMALL)
  out = np.asarray(run(attend)[0][0])
  gone = np.flatnonzero((out == 0).all(axis=(1, 2)))
  stays = np.setdiff1d(np.arange(N), gone)
  assert 3 <= len(gone) <= 6
  less = jax.tree.map(lambda x: x[:, stays], TEXT)
  np.testing.assert_allclose(
    out[stays], run(Causal(), less)[0][0], rtol=1e-4, atol=1e-5
  )


def test_a_threshold_takes_blocks_of_little_interest_away():
  loud = jnp.where(jnp.arange(N)[None, :, None, None] < S, 5.0, 0.2)
  a = Arrivals(
    loud * jnp.ones((1, N, 2, 4)), loud * jnp.ones((1, N, 1, 4)), TEXT.v,
    TEXT.position, TEXT.valid,
  )  # fmt: skip

  def left(**options):
    attend = Eliminated(
      budgets.Share(1.0), predicts=False, **SMALL, **options
    )
    return np.flatnonzero(np.any(run(attend, a)[0][0], axis=(1, 2))).tolist()

  assert left() == list(range(N))
  assert left(threshold=1.0) == list(range(S))
  assert left(threshold=1.0, last=1) == [*range(S), N - 1]


def test_networks_learn_what_is_measured_and_nothing_else_moves():
  attend = Eliminated(learns=True, **SMALL)
  params = attend.parameters(LAYER, 8, jax.random.key(0))

  def loss(params, x, q):
    a = Arrivals(q, TEXT.k, TEXT.v, TEXT.position, TEXT.valid, x=x)
    out, carry = run.__wrapped__(attend, a, params)
    return carry[LOSSES]["pairs"][0], out

  grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
  (value, out), slopes = grad(params, TEXT.x, TEXT.q)
  np.testing.assert_array_equal(out, run(Causal())[0])
  assert all(np.any(x) for x in jax.tree.leaves(slopes[0]))
  assert not any(np.any(x) for x in slopes[1:])
  x = jnp.pad(TEXT.x[0], [(0, 2), (0, 0)])
  guess = eliminated.predicted(params, x, 2, S)
  truth = np.array([[pair(i, j, False) for j in range(4)] for i in range(4)])
  gap = np.abs(np.asarray(guess) - truth / 1024)
  want = np.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
  np.testing.assert_allclose(value, want, rtol=1e-4)


def test_options_are_refused():
  for name in ("block", "hidden"):
    with pytest.raises(ValueError, match=f"{name}=0: must be 1 or more"):
      recipes.get("lemo", **{name: 0})
  with pytest.raises(ValueError, match="from_layer=3: must be a block in 0..0"):
    Eliminated(from_layer=3).check(LAYER, 8)
  with pytest.raises(ValueError, match="2 heads: must divide the width 7"):
    Eliminated(**SMALL).parameters(LAYER, 7, jax.random.key(0))
