"""Sparsifiner: its card and a NumPy reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.learned import models, reference
from tokjax import learned, recipes
from tokjax.attention import dense


def projections(n=24, heads=3, width=8, seed=0):
  rng = np.random.default_rng(seed)
  shape = (3, 2, heads, n, width)
  return tuple(jnp.asarray(a, jnp.float32) for a in rng.normal(size=shape))


def started(module, q, k, v):
  params = jax.jit(module.init)(jax.random.key(0), q, k, v)["params"]
  return models.scattered(params, 0.3)


def run(module, params, *qkv):
  apply = lambda params, *qkv: module.apply({"params": params}, *qkv)
  return jax.jit(apply)(params, *qkv)


def test_rows_of_197_tokens():
  module = learned.SparseMask(keep=0.25)
  rng = np.random.default_rng(0)
  mixture = reference.softmax(rng.normal(size=(1, 2, 196, 32)))
  basis = rng.normal(size=(197, 32), scale=0.05)
  seen = module.connectivity(
    jnp.asarray(mixture, jnp.float32), jnp.asarray(basis, jnp.float32)
  )
  count = np.asarray(seen).sum(axis=-1)
  assert (count[..., 0] == 197).all()
  assert (count[..., 1:] == 50).all()
  assert np.any(seen[0, 0] != seen[0, 1]), "heads look elsewhere"
  for h in range(2):
    expected = reference.connectivity(mixture[0, h], basis, 0.25)
    np.testing.assert_array_equal(seen[0, h], expected)


def test_the_predictor_against_numpy():
  q, k, v = projections()
  module = learned.SparseMask(keep=0.25)
  params = started(module, q, k, v)
  out = run(module, params, q, k, v)
  q, k, v, params = jax.device_get((q, k, v, params))
  n, rank = params["down"].shape
  assert (n, rank) == (24, 4)
  for h in range(3):
    small_q = reference.linear(q[1, h, 1:], params["query"])
    small_k = reference.linear(k[1, h], params["key"])
    # The scale is that of the number of heads, as in the official code.
    logits = small_q @ (small_k.T @ params["down"]) * 3**-0.5
    mask = reference.connectivity(
      reference.softmax(logits), params["basis"], 0.25
    )
    logits = q[1, h] @ k[1, h].T * 8**-0.5
    weight = reference.softmax(np.where(mask > 0, logits, -1e30))
    np.testing.assert_allclose(
      out[1, h], weight @ v[1, h], rtol=1e-4, atol=1e-5
    )


def test_all_keys_are_dense_attention():
  q, k, v = projections()
  whole = dense.Dense()(q, k, v)
  module = learned.SparseMask(keep=1.0)
  np.testing.assert_array_equal(module.apply({}, q, k, v), whole)
  turned = recipes.get("sparsifiner", keep=1.0).attend
  assert turned.keep == 1.0
  almost = learned.SparseMask(keep=0.9999)
  params = started(almost, q, k, v)
  found = run(almost, params, q, k, v)
  np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)


def test_the_mask_has_no_gradient():
  q, k, v = projections()
  module = learned.SparseMask(keep=0.25)
  params = started(module, q, k, v)

  def loss(params, q):
    return jnp.square(module.apply({"params": params}, q, k, v)).sum()

  of_params, of_q = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, q)
  assert not any(np.any(g) for g in jax.tree.leaves(of_params))
  assert np.abs(of_q).max() > 0


def test_the_first_phase_is_dense_and_teaches_only_the_predictor():
  q, k, v = projections()
  module = learned.SparseMask(predict=True)
  params = started(module, q, k, v)

  def loss(params, q):
    out, sown = module.apply({"params": params}, q, k, v, mutable=["losses"])
    return sown["losses"]["sparsifiner"][0], out

  both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  (error, out), (of_params, of_q) = jax.jit(both)(params, q)
  np.testing.assert_allclose(out, dense.Dense()(q, k, v), rtol=1e-5, atol=1e-6)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(of_params))
  assert not of_q.any(), "the backbone is not bent towards the prediction"
  q, k, params = jax.device_get((q, k, params))
  expected = 0.0
  for b in range(2):
    for h in range(3):
      small_q = reference.linear(q[b, h, 1:], params["query"])
      small_k = reference.linear(k[b, h], params["key"])
      logits = small_q @ (small_k.T @ params["down"]) * 3**-0.5
      guess = reference.softmax(logits) @ params["basis"].T
      weight = reference.softmax(q[b, h] @ k[b, h].T * 8**-0.5)
      expected += np.square(guess - weight[1:]).sum() / 2
  np.testing.assert_allclose(error, expected, rtol=1e-4)


def test_the_recipe_sows_in_its_first_phase_only():
  slots = recipes.get("sparsifiner", predict=True, weight=0.5)
  (loss,) = slots.losses
  assert (loss.name, loss.weight) == ("sparsifiner", 0.5)
  assert not recipes.get("sparsifiner").losses
  with pytest.raises(ValueError, match=r"share=0.*\(0, 1\]"):
    recipes.get("sparsifiner", share=0.0)
