"""SPT: codes, what their codewords learn from, and whom queries see."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.cases import Rope
from tokjax import budgets, recipes
from tokjax.attention import matched_codes
from tokjax.attention.causal import Causal
from tokjax.attention.matched_codes import MatchedCodes
from tokjax.layer import LOSSES, Arrivals, Layer, Memory
from tokjax.losses import Told, View

LAYER = Layer(heads=2, kv_heads=1, head_dim=4, rotary=Rope())
RNG = np.random.default_rng(0)
WORDS = RNG.normal(size=(2, 3, 2)).astype(np.float32)


def slow_loss(x):
  """Of one vector: each part alone."""
  gaps = []
  for part, words in zip(x.reshape(2, 2), WORDS, strict=True):
    far = [np.abs(part - w).sum() for w in words]
    hard = words[int(np.argmin(far))]
    weight = np.array([1 / f for f in far])
    soft = sum(w * x for w, x in zip(weight / weight.sum(), words, strict=True))
    gaps += [(soft - hard) ** 2, (part - hard) ** 2]
  return 2 * np.mean(gaps)


def test_the_loss_is_that_of_each_part():
  x = RNG.normal(size=(2, 5, 2, 4)).astype(np.float32)
  valid = np.arange(5)[None] < np.array([[5], [3]])
  got = matched_codes.quantisation_loss(
    jnp.asarray(WORDS), jnp.asarray(x), jnp.asarray(valid)
  )
  want = np.mean(
    [slow_loss(x[b, i, h]) for b, i in np.argwhere(valid) for h in range(2)]
  )
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_agreement_is_counted_and_earlier_keys_win():
  """The card: codes (1, 2, 3) agree with three keys in 2, 1 and 3 places."""
  code = jnp.asarray([[1, 2, 0], [1, 0, 0], [1, 2, 3], [1, 2, 3]])
  code = code[None, :, None]
  n = 4
  kv = jnp.zeros((1, n, 1, 4))
  real = jnp.ones((1, n), bool)
  a = Arrivals(kv, kv, kv, jnp.arange(n)[None], real)
  layer = Layer(head_dim=4)
  for count, want in ((1, [2]), (2, [2, 3]), (3, [0, 2, 3])):
    attend = MatchedCodes(budgets.Count(count))
    seen = attend._chosen(layer, code, code, a, Memory.of(a))(jnp.arange(n))
    assert np.flatnonzero(seen[0, 0, 3]).tolist() == want


def test_it_learns_while_it_is_dense_or_chooses():
  draw = lambda h: jnp.asarray(RNG.normal(size=(1, 6, h, 4)), jnp.float32)
  real = jnp.ones((1, 6), bool)
  a = Arrivals(draw(2), draw(1), draw(1), jnp.arange(6)[None], real)
  params = {"attend": {"words": jnp.asarray(WORDS)}}

  @functools.partial(jax.jit, static_argnums=0)
  def run(attend, carry):
    return attend(LAYER, a, Memory.of(a), params=params, carry=carry)

  attend = MatchedCodes(part=2, words=3, learns=True, dense=True)
  out, carry = run(attend, {})
  np.testing.assert_array_equal(out, run(Causal(), {})[0])
  few = MatchedCodes(budgets.Count(2), part=2, words=3, learns=True)
  out, few_carry = run(few, {})
  use = dataclasses.replace(few, learns=False)
  np.testing.assert_array_equal(out, run(use, {})[0])
  assert few_carry[LOSSES] == carry[LOSSES]
  _, carry = run(attend, carry)
  told = carry[LOSSES]
  view = View(*[None] * 6, {"losses": told})
  assert Told("codewords")(view) == 2 * told["codewords"][0] > 0


def test_options_are_refused():
  for name in ("part", "words"):
    with pytest.raises(ValueError, match=f"{name}=0: must be 1 or more"):
      recipes.get("spt", **{name: 0})
  with pytest.raises(ValueError, match="dense=True: is a stage of training"):
    recipes.get("spt", dense=True)
  with pytest.raises(ValueError, match="bound=0.0: must be positive"):
    recipes.get("spt", bound=0.0)
  with pytest.raises(ValueError, match="part=8: must divide the 4 features"):
    MatchedCodes().check(LAYER, 8)
  model = recipes.get("cca")
  with pytest.raises(ValueError, match="'codewords': no layer of recipe"):
    Told("codewords")(
      View(type("M", (), {"slots": model}), *[None] * 5, {"losses": {"x": ()}})
    )
  assert jax.tree.leaves(recipes.get("spt", learns=True).losses)
