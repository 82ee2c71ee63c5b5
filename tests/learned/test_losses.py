"""The numbers that the cards promise of the losses."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import recall
from experiments import train
from experiments.tasks import TASKS
from tests.decoder.models import config as decoder_config
from tests.decoder.models import decoder, params_of, tokens
from tests.experiments import tiny
from tests.learned import reference
from tokjax import losses
from tokjax.models import Decoder, DecoderConfig
from tokjax.recipes import registry
from tokjax.signals import Answers, Attention, Block
from tokjax.slots import Slots


class View(losses.View):
  """A training step, with what is not needed left out."""

  def __init__(self, out, model=None, target=None, logits=None, other=None):
    super().__init__(model, None, None, target, None, logits, out)
    object.__setattr__(self, "other", other)

  def again(self, slots):
    object.__setattr__(self, "asked", slots)
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


# ----- Every task adds them -----


@dataclasses.dataclass(frozen=True)
class Confidence:
  """Mean probability of the right answer, so that it has to be known."""

  weight: float = 0.5
  name = "confidence"

  def __call__(self, view):
    sure = jax.nn.softmax(view.logits) * view.target
    return sure.sum() / view.target.sum()


LANGUAGE = DecoderConfig(
  vocabulary=7, width=8, depth=1, heads=2, kv_heads=1, head_dim=4, mlp_dim=8,
  length=16,
)  # fmt: skip


def test_a_decoder_trains_with_the_losses_of_its_recipe():
  rng = np.random.default_rng(0)
  target = rng.integers(-1, 7, (2, 5))
  tokens = jnp.asarray(rng.integers(0, 7, (2, 5)))
  batch = {"tokens": tokens, "target": target}
  plain = Decoder(LANGUAGE)
  params = plain.init(jax.random.key(0), tokens)["params"]
  task, key = TASKS["language"](), jax.random.key(1)

  run = lambda p, slots: task.loss(plain.clone(slots=slots), p, batch, key)[1]
  with_loss = Slots(losses=(Confidence(),))
  alone, metrics = jax.jit(lambda p: (run(p, Slots()), run(p, with_loss)))(
    params
  )
  logits = np.asarray(plain.apply({"params": params}, tokens)[0])
  share = reference.softmax(logits)
  asked = target >= 0
  rows = np.take_along_axis(share, np.maximum(target, 0)[..., None], -1)
  expected = rows[..., 0][asked].mean()
  np.testing.assert_allclose(metrics["confidence"], expected, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["loss"], alone["loss"] + 0.5 * expected, rtol=1e-5
  )
  assert metrics["bits_per_token"] == alone["bits_per_token"]


def test_the_loop_logs_the_losses_of_a_decoders_recipe(tmp_path, monkeypatch):
  own = registry.Recipe(
    "sure", "llm", "-", "both", "-", "",
    lambda: Slots(losses=(Confidence(),)),
  )  # fmt: skip
  monkeypatch.setitem(registry._RECIPES, "sure", own)
  config = recall.get_config("runlocal")
  config.recipe.name, config.steps = "sure", 1
  config.model.update(depth=1, layers=("full",))
  train.main(config, tmp_path)
  row = tiny.rows(tmp_path)[1]
  nats = row["bits_per_token"] * math.log(2)
  assert row["confidence"] > 0
  assert row["loss"] == pytest.approx(nats + 0.5 * row["confidence"], rel=1e-5)


def test_diversity_of_a_language_model():
  """A decoder collects its maps, and the task adds the loss on them."""
  slots = Slots(losses=(losses.Diversity(1.5),), collect=(Attention(),))
  model, params = decoder(slots), params_of(decoder_config())
  ids = jnp.asarray(tokens(2, 7))
  _, metrics = TASKS["language"]().loss(
    model, params, {"tokens": ids}, jax.random.key(0)
  )
  _, out = model.apply({"params": params}, ids[:, :-1])
  maps = [answers.of(Attention) for answers in out["signals"]]
  expected = np.mean([reference.diversity(a, 1.5) for m in maps for a in m])
  np.testing.assert_allclose(metrics["diversity"], expected, rtol=1e-4)


def test_a_loss_that_the_model_cannot_feed_is_refused():
  """Nothing is skipped silently."""
  model = type("M", (), {"slots": Slots(name="mine")})
  view = View({"tokens": None, "signals": []}, model=model)
  for loss, missing in (
    (losses.Diversity(), "signals"), (losses.Budget(0.5), "kept"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=rf"'mine'.*out\['{missing}'\]"):
      loss(view)


def test_sown_losses_have_exactly_the_name():
  sown = {"block_0": {"mine_too": (jnp.array(2.0),), "mine": (jnp.array(4.0),)}}
  model = type("M", (), {"slots": Slots(name="mine")})
  assert losses.Sown("mine")(View({"sown": sown}, model=model)) == 4


def test_sink_decorrelation_by_hand_and_padded():
  first = np.array([2.0, 0, 0])
  rest = [[0.6, 0.8, 0], [0, 3.0, 0]]
  one = jnp.asarray([[first, *rest]])[:, None]
  ones = jnp.ones((1, 3), bool)
  value = lambda x, valid: float(losses.sink_decorrelation(x, valid))
  assert value(one, ones) == pytest.approx(0.18)
  assert value(-one * jnp.asarray([-1, 1, 1])[None, None, :, None], ones) == (
    pytest.approx(0.18)
  )
  # A second layer of alike states, and a token of padding that is anything.
  both = jnp.concatenate([one, jnp.ones_like(one)])
  assert value(both, ones) == pytest.approx((0.18 + 1) / 2)
  hidden = both.at[:, :, 2].set(7.0)
  valid = jnp.asarray([[True, True, False]])
  assert value(hidden, valid) == pytest.approx((0.36 + 1) / 2)
  slope = jax.jit(jax.grad(losses.sink_decorrelation))(hidden, valid)
  assert np.isfinite(slope).all()
  assert not np.any(slope[:, :, 2])
  assert np.abs(slope[0, 0, 0]).max() > 0
  with pytest.raises(ValueError, match="hidden has 1 tokens"):
    losses.sink_decorrelation(one[:, :, :1], ones[:, :1])
