"""DynamicViT: its card, a NumPy reference, and its two forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.learned import models, reference
from tokjax import budgets, learned, losses, recipes
from tokjax.attention import dense
from tokjax.recipes.vision import learned as rules
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.stage import Stage
from tokjax.signals import Answers
from tokjax.slots import Slots
from tokjax.tokens import Tokens


def attend(logits, policy):
  """`probabilities` of one head with the given logits."""
  n = len(policy)
  q = jnp.asarray(logits, jnp.float32)[None, None] * n**0.5
  k = jnp.eye(n)[None, None]
  return dense.probabilities(q, k, policy=jnp.asarray(policy)[None])[0, 0]


def test_who_is_absent_is_seen_by_itself_only():
  weight = attend(np.zeros((3, 3)), np.array([1.0, 1.0, 0.0], "float32"))
  np.testing.assert_allclose(weight[:2], [[0.5, 0.5, 1.67e-7]] * 2, rtol=2e-3)
  np.testing.assert_allclose(weight[2], [1 / 3] * 3, rtol=1e-6)


def test_with_all_present_it_is_the_softmax():
  logits = np.random.default_rng(0).normal(size=(5, 5)) * 3
  weight = attend(logits, np.ones((5,), "float32"))
  np.testing.assert_allclose(weight, reference.softmax(logits), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_policy_softmax_against_numpy(seed):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(6, 6)) * 4
  policy = rng.choice([0.0, 0.3, 1.0], size=6).astype("float32")
  expected = reference.policy_softmax(logits, policy)
  np.testing.assert_allclose(attend(logits, policy), expected, rtol=1e-4)


def test_a_padded_example_without_tokens_stays_finite():
  q = jnp.ones((1, 1, 3, 2))
  run = lambda q: dense.probabilities(
    q, q, policy=jnp.ones((1, 3)), mask=jnp.zeros((1, 3), bool)
  ).sum()
  value, grad = jax.value_and_grad(run)(q)
  assert np.isfinite(value) and np.isfinite(grad).all()


def predict(x, policy):
  tokens = jax.vmap(lambda x: Tokens.create(x))(jnp.asarray(x)[None])
  if policy is not None:
    tokens = tokens.replace(policy=jnp.asarray(policy)[None])
  reduce = Reduce(rules.dynamicvit_rule, budgets.Ratio(0.7))
  stage = Stage(reduce, 3, 1, 3, 1, len(x) - 1)
  module = learned.KeepPredictor()
  params = module.init(jax.random.key(0), tokens, Answers(), stage)["params"]
  params = models.scattered(params)
  found = module.apply({"params": params}, tokens, Answers(), stage)
  return found, jax.device_get(params)


@pytest.mark.parametrize("policy", [None, [1, 1, 0, 1, 0, 1, 1]])
def test_predictor_against_numpy(policy):
  x = np.random.default_rng(2).normal(size=(7, 8)).astype("float32")
  given = None if policy is None else np.array(policy, "float32")
  found, params = predict(x, given)
  present = np.ones((6,)) if policy is None else np.array(policy[1:], float)
  expected = reference.keep_predictor(params, x[1:], present)
  np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)


def test_counts_of_196_patches():
  (counts,) = recipes.get("dynamicvit").counts(196, 12)
  assert [c for c in counts if c is not None] == [137, 96, 67]
  assert [i for i, c in enumerate(counts) if c is not None] == [3, 6, 9]


def test_bits_are_drawn_with_their_probability():
  logits = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]))
  keys = jax.random.split(jax.random.key(0), 4000)
  bits = jax.vmap(lambda k: losses.gumbel_keep(k, logits))(keys)
  np.testing.assert_allclose(bits, np.round(bits), atol=1e-6)
  np.testing.assert_allclose(bits.mean(axis=0), [0.9, 0.5, 0.2], atol=0.03)


def test_the_gradient_of_a_bit_is_that_of_the_softmax():
  logits, key = jnp.array([[0.3, -0.2], [1.0, 0.4]]), jax.random.key(3)
  weight = jnp.array([2.0, -1.0])
  noise = jax.random.gumbel(key, logits.shape)

  def soft(logits):
    return (jax.nn.softmax((logits + noise) / 0.7)[:, 0] * weight).sum()

  def hard(logits):
    return (losses.gumbel_keep(key, logits, 0.7) * weight).sum()

  np.testing.assert_allclose(
    jax.grad(hard)(logits), jax.grad(soft)(logits), rtol=1e-6
  )


def test_what_is_dropped_stays_dropped_and_has_a_gradient():
  model = models.build("dynamicvit", keep=0.3)
  params = models.scattered(models.init(model))

  def run(params):
    _, out = model.apply(
      {"params": params}, models.images(), key=jax.random.key(1), train=True
    )
    kept = jnp.stack(out["kept"])
    return kept.sum(), (kept, out["tokens"], out["scheduled"])

  grads, (kept, tokens, scheduled) = jax.jit(jax.grad(run, has_aux=True))(
    params
  )
  assert kept.shape == (len(scheduled), 3)
  assert (np.diff(kept, axis=0) <= 1e-6).all()
  assert tokens.num_tokens == 17, "nothing is removed while training"
  policy = np.asarray(tokens.policy)
  np.testing.assert_array_equal(policy[:, 0], 1)
  np.testing.assert_allclose(policy[:, 1:].mean(axis=1), kept[-1], rtol=1e-5)
  for block in ("block_1", "block_2"):
    own = grads["encoder"][block]["learned_0"]
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(own)), block


def bits_of_the_rule(site):
  """Hard bits that say what the rule would gather."""
  score = site.learned[:, 0]
  if site.tokens.policy is not None:
    score = jnp.where(site.free(site.tokens.policy) > 0.5, score, -jnp.inf)
  place = jnp.argsort(jnp.argsort(-score))
  return (place < site.keep).astype(jnp.float32)


def test_training_and_inference_agree_where_the_bits_do():
  slots = recipes.get("dynamicvit", keep=0.3)
  reduce = dataclasses.replace(slots.reduce[0], soft=bits_of_the_rule)
  model = models.build(Slots(reduce))
  params = models.scattered(models.init(model), 0.3)
  key = jax.random.key(0)
  soft, out = models.apply(model, params, models.images(), key=key, train=True)
  hard, few = models.apply(model, params, models.images(), key=key)
  assert out["tokens"].num_tokens == 17 and few["tokens"].num_tokens < 8
  np.testing.assert_allclose(soft, hard, rtol=1e-4, atol=1e-4)
  random, _ = models.apply(
    models.build(slots), params, models.images(), key=key, train=True
  )
  assert np.abs(random - hard).max() > 1e-2, "other bits, another output"


def test_training_needs_a_key():
  model = models.build("dynamicvit")
  with pytest.raises(ValueError, match="dynamicvit.*key="):
    jax.eval_shape(
      lambda x: model.init(jax.random.key(0), x, train=True), models.images(1)
    )
