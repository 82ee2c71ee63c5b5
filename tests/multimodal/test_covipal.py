"""CoViPAL: its card, its gate, what its two stages learn from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.cases import QUICK
from tests.contract.case import draw_params
from tests.decoder.models import config
from tokjax import budgets, losses, recipes
from tokjax.models.decoder import Decoder
from tokjax.recipes.multimodal import covipal
from tokjax.reduce.site import Site
from tokjax.signals import Answers, Block, Last, Rows
from tokjax.tokens import Kind, Tokens

# Two examples: six and three VISUAL tokens among text.
IDS = jnp.asarray(
  [[3, 5, 7, 9, 11, 13, 15, 17, 19], [2, 4, 6, 8, 10, 12, 0, 0, 0]]
)
MASK = IDS > 0
KIND = np.full((2, 9), int(Kind.TEXT), np.int32)
KIND[0, 1:7] = KIND[1, 2:5] = int(Kind.VISUAL)
KIND = jnp.asarray(KIND)


def site(score, keep: float = 0.5) -> Site:
  """Of tokens of which all but the first are visual."""
  n = len(score)
  tokens = Tokens.create(jnp.zeros((n, 2)))
  free = jnp.arange(n) > 0
  return Site(
    tokens, Answers(), 2, 0, 2, free_at=free, learned=jnp.asarray(score),
    budget=budgets.Once(keep),
  )  # fmt: skip


def test_card_all_stay_and_the_gate_is_one():
  np.testing.assert_array_equal(
    covipal.gate(site([0.0, 1, 2, 3, 4], 1.0), temperature=1.0), 1.0
  )


def test_card_the_gate_is_a_half_between_the_last_and_the_first():
  # Of scores 4, 3 | 1, 0 two stay: the edge is at 2.
  found = covipal.gate(site([9.0, 1, 4, 3, 0]), temperature=2.0)
  x = (np.array([1.0, 4, 3, 0]) - 2) / 2
  np.testing.assert_allclose(found[1:], 1 / (1 + np.exp(-x)), rtol=1e-5)


def test_card_divergence_of_equal_shares_is_none():
  scores = jnp.log(jnp.array([[1.0, 2.0, 1.0, 4.0]])).at[0, 0].set(-jnp.inf)
  seen = jnp.array([[0.5, 0.1, 0.05, 0.2]])
  assert abs(losses._divergence(seen, scores)) < 1e-6
  other = losses._divergence(seen[:, ::-1], scores)
  # Shares .2, .4, 2 of 2.6 ... against 2/7, 1/7, 4/7, by hand.
  p = np.array([0.05, 0.1, 0.5]) / 0.65
  expected = (p * np.log(p / (np.array([2, 1, 4]) / 7))).sum()
  np.testing.assert_allclose(other, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def gated():
  """Model and parameters, of one module in front of the second block."""
  slots = recipes.get("covipal", budget=budgets.Once(0.5, 1), width=4)
  model = Decoder(config(depth=2, tied=False), slots)
  shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)
  return model, draw_params(shapes["params"])


def call(model, params, train: bool):
  """Logits, what remains, and what was sown."""

  def run(params):
    (logits, out), sown = model.apply(
      {"params": params}, IDS, mask=MASK, kind=KIND, key=jax.random.key(0),
      train=train, mutable=["losses"],
    )  # fmt: skip
    return logits, out, sown

  return jax.jit(run, compiler_options=QUICK)(params)


def test_the_best_of_the_module_stay(gated):
  model, params = gated
  _, out, sown = call(model, params, False)
  (score,) = jax.tree.leaves(sown)
  assert np.isfinite(np.asarray(score)).sum() == 9
  for i, keep in enumerate((3, 2)):
    own = np.where(KIND[i] == Kind.VISUAL, score[i], -np.inf)
    best = np.sort(np.argsort(-own, kind="stable")[:keep])
    text = np.flatnonzero((KIND[i] != Kind.VISUAL) & MASK[i])
    kept = np.flatnonzero(out["remains"][i])
    np.testing.assert_array_equal(kept, np.sort([*best, *text]))


def test_training_removes_nothing_and_a_hard_gate_is_as_good_as_removal(gated):
  model, params = gated
  logits, out, _ = call(model, params, True)
  assert out["remains"].sum() == MASK.sum()
  (reduce,) = model.slots.reduce
  hard = dataclasses.replace(
    reduce, soft=lambda site: covipal.gate(site, temperature=1e-4)
  )
  slots = dataclasses.replace(model.slots, reduce=hard)
  gate, _, _ = call(model.clone(slots=slots), params, True)
  gone, left, _ = call(model, params, False)
  text = left["remains"] & (KIND != Kind.VISUAL)
  np.testing.assert_allclose(gate[text], gone[text], rtol=1e-3, atol=1e-3)
  assert np.abs(np.asarray(logits - gate))[text].max() > 1e-3


def test_the_gate_teaches_the_module(gated):
  model, params = gated

  def loss(params):
    logits, _ = model.apply(
      {"params": params}, IDS, mask=MASK, kind=KIND, key=jax.random.key(0),
      train=True, mutable=["losses"],
    )[0]  # fmt: skip
    return jnp.square(logits[:, 5]).sum()

  grads = jax.jit(jax.grad(loss), compiler_options=QUICK)(params)
  own = jax.tree.leaves(grads["block_1"]["learned_0"]["out"])
  assert np.abs(own[1]).max() > 0


def test_refused():
  for options, message in (
    (dict(phase="both"), "phase='both'"),
    (dict(temperature=0.0), "temperature=0.0"),
    (dict(width=0), "width=0"),
  ):
    with pytest.raises(ValueError, match=message):
      recipes.get("covipal", **options)
  slots = recipes.compose("covipal", "minference_a_shape", keep=0.5)
  with pytest.raises(ValueError, match="(?s)trains softly.*attend"):
    Decoder(config(), slots)


def test_attention_of_the_last_token_guides():
  slots = recipes.get("covipal", phase="guided")
  assert slots.collect == (Rows(of=Last(), over="mean"),)
  answers = Answers().add(
    Rows(of=Last(), over="mean", layer=Block(1)), jnp.array([[0.2, 0.8]])
  )
  out = {
    "signals": [Answers(), answers],
    "sown": {"block_0": {"scores": jnp.log(jnp.array([[0.2, 0.8]]))}},
  }
  view = losses.View(None, None, None, None, None, None, out)
  assert abs(losses.Guided(0.5)(view)) < 1e-6
