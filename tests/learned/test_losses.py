"""The numbers that the cards promise of the losses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.learned import reference
from tokjax import losses
from tokjax.signals import Answers, Attention, Block
from tokjax.slots import Slots


@dataclasses.dataclass
class View:
  """A training step, with what is not needed left out."""

  out: dict[str, Any]
  model: Any = None
  target: Any = None
  logits: Any = None
  other: Any = None
  asked: Any = None

  def again(self, slots):
    self.asked = slots
    return self.other


@pytest.mark.parametrize(
  ("rows", "factor", "expected"),
  [
    ([(0.7, 0.1, 0.1, 0.1)] * 4, 2.0, 1),
    (np.eye(4), 2.0, 0),
    (np.full((4, 4), 0.25), 2.0, 0),
    ([(0.8, 0.2, 0, 0)] * 2 + [(0, 0, 0.8, 0.2), (0, 0, 0.2, 0.8)], 2.0, 0),
    ([(0.8, 0.2, 0, 0)] * 2 + [(0, 0, 0.8, 0.2), (0, 0, 0.2, 0.8)], 1.0, 0.5),
  ],
)
def test_diversity_of_the_card(rows, factor, expected):
  attention = jnp.asarray(rows, jnp.float32)[None]
  value, grad = jax.value_and_grad(losses.attention_diversity)(
    attention, factor
  )
  np.testing.assert_allclose(value, expected, atol=1e-6)
  assert np.isfinite(grad).all()


def test_diversity_against_numpy_over_layers_and_batch():
  rng = np.random.default_rng(0)
  maps = [
    reference.softmax(2 * rng.normal(size=(2, 3, 9, 9))) for _ in range(2)
  ]
  signals = [
    Answers((Attention(Block(i)),), (jnp.asarray(m, jnp.float32),))
    for i, m in enumerate(maps)
  ]
  found = losses.Diversity(factor=1.5)(View({"signals": signals}))
  expected = np.mean([reference.diversity(a, 1.5) for m in maps for a in m])
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_ratio_is_the_mean_over_images_of_their_own_distance():
  kept = [jnp.array([0.5, 0.9]), jnp.array([0.2, 0.4])]
  view = View({"kept": kept, "scheduled": [0.7, 0.49]})
  expected = np.mean([0.2**2, 0.2**2, 0.29**2, 0.09**2])
  np.testing.assert_allclose(losses.Ratio()(view), expected, rtol=1e-5)
  given = losses.Ratio(targets=(0.5, 0.2))(view)
  np.testing.assert_allclose(given, np.mean([0, 0.4**2, 0, 0.2**2]), rtol=1e-5)
  with pytest.raises(ValueError, match="1 targets for 2 stages"):
    losses.Ratio(targets=(0.5,))(view)


def test_budget_counts_only_what_is_above():
  view = View({"kept": [jnp.array([0.5, 0.9])]})
  np.testing.assert_allclose(losses.Budget(0.6)(view), 0.1, rtol=1e-5)
  assert losses.Budget(0.8)(view) == 0


def test_a_recipe_without_gates_is_named():
  model = type("M", (), {"slots": Slots(name="tome")})
  with pytest.raises(ValueError, match=r"'tome'.*out\['kept'\]"):
    losses.Ratio()(View({"kept": []}, model=model))


def consistency(**options):
  """Two images, of which the model is sure of the first."""
  pooled = jnp.array([[1.0, 2.0], [3.0, 3.0]])
  other = jnp.array([[1.0, 0.0], [0.0, 0.0]])
  logits = jnp.log(jnp.array([[0.8, 0.2], [0.7, 0.3]]))
  view = View(
    {"pooled": pooled},
    target=jnp.eye(2),
    logits=logits,
    other=(jnp.zeros((2, 2)), {"pooled": other}),
  )
  return losses.Consistency(**options)(view), view


def test_consistency_of_the_sure_examples():
  value, view = consistency(confidence=0.4)
  np.testing.assert_allclose(value, (0 + 4) / 2, rtol=1e-6)
  assert view.asked.reduce == ()
  both, _ = consistency()
  np.testing.assert_allclose(both, np.mean([2, 9]), rtol=1e-6)
  none, _ = consistency(confidence=0.9)
  assert none == 0


def test_the_other_pass_is_supervised_once_whatever_the_weight():
  plain, _ = consistency(weight=3.0)
  more, _ = consistency(weight=3.0, supervise=1.0)
  np.testing.assert_allclose(3.0 * (more - plain), np.log(2), rtol=1e-6)


def test_a_detached_pass_has_no_gradient():
  def run(other, detach):
    view = View(
      {"pooled": jnp.ones((1, 2))},
      target=jnp.eye(2)[:1],
      logits=jnp.zeros((1, 2)),
      other=(jnp.zeros((1, 2)), {"pooled": other}),
    )
    return losses.Consistency(detach=detach)(view)

  other = jnp.zeros((1, 2))
  assert not jax.grad(run)(other, True).any()
  assert jax.grad(run)(other, False).all()


def test_sown_is_the_mean_over_layers_or_an_error():
  sown = {
    "block_0": {"mine": (jnp.array(2.0),)},
    "block_1": {"mine": (jnp.array(4.0),)},
  }
  model = type("M", (), {"slots": Slots(name="sparsifiner")})
  view = View({"sown": sown}, model=model)
  assert losses.Sown("mine")(view) == 3
  with pytest.raises(ValueError, match="'other'.*'sparsifiner'"):
    losses.Sown("other")(view)
