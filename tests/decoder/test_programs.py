"""Blocks that rules treat alike share a program, and no others do."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.models import config, decoder, params_of, tokens
from tokjax import budgets, recipes
from tokjax.cache.evict import evicting
from tokjax.cache.kv import KV
from tokjax.layer import Layer
from tokjax.models import generation
from tokjax.models.decoder_programs import HELD, programs_of
from tokjax.models.shared_programs import Shared
from tokjax.reduce.rules import KeepTop
from tokjax.slots import Slots

DEPTH, PROMPT, STEPS = 4, 12, 2


def by_layer(site):
  """A score that differs from block to block, as a user may write it."""
  return site.position[:, 0] if site.layer % 2 else -site.position[:, 0]


SIX = budgets.Count(6)
OWN = Slots(cache=KV(evicting(KeepTop(by_layer), SIX)), name="own")
# How many programs the four blocks have, for a prompt and for a step: a
# step depends on what a layer holds, which is the same in two of a pyramid.
CASES = {
  "full": (recipes.get("full"), 1, 1),
  "snapkv": (recipes.get("snapkv", budget=SIX, window=2, kernel=3), 1, 1),
  "random_kv": (recipes.get("random_kv", budget=SIX), 1, 1),
  "quest": (recipes.get("quest", budget=SIX, page=2, least=1), 2, 2),
  "pyramidkv": (
    recipes.get("pyramidkv", budget=SIX, window=2, kernel=3, beta=3), 4, 3
  ),
  "own": (OWN, 4, 1),
}  # fmt: skip


def run(model, params, text):
  length = jnp.asarray([PROMPT, PROMPT - 5])
  going = generation.prefill(model, params, text[:, :PROMPT], length, STEPS)
  out = [going.logits]
  for i in range(STEPS):
    going = generation.decode_step(model, params, going, text[:, PROMPT + i])
    out.append(going.logits)
  return jnp.stack(out)


@pytest.mark.parametrize("name", CASES)
def test_shared_programs_give_what_one_program_gives(name):
  slots, prompts, steps = CASES[name]
  model, params = decoder(slots, depth=DEPTH), params_of(config(depth=DEPTH))
  text = jnp.asarray(tokens(2, PROMPT + STEPS))
  alone = run(model, params, text)
  whole = jax.jit(run, static_argnums=0)(model, params, text)
  np.testing.assert_allclose(alone, whole, atol=2e-5, rtol=0)
  programs = programs_of(model)
  (prefill,) = programs._quiet.values()
  assert (prefill.compiled(), programs._step.compiled()) == (prompts, steps)


def test_programs_of_models_that_others_followed_are_let_go():
  """A process that keeps all it compiles runs out of memory maps."""
  text = jnp.asarray(tokens(2, PROMPT + STEPS))
  params = params_of(config(depth=1))
  first = decoder(recipes.get("full"), depth=1)
  run(first, params, text)
  held = weakref.ref(programs_of(first))
  step = weakref.ref(next(iter(held()._step._programs.values()))[0].call)
  for count in range(HELD):
    assert held() is not None
    slots = recipes.get("random_kv", budget=budgets.Count(2 + count))
    programs_of(decoder(slots, depth=1))
  gc.collect()
  assert held() is None and step() is None


def test_a_rule_that_reads_the_index_shares_with_nobody():
  told = []

  def run(layer, x):
    told.append(layer.index)
    return x * layer.index

  shared = Shared(run)
  out = [int(shared(Layer(i, 3), jnp.int32(5))) for i in (0, 1, 2, 1)]
  assert out == [0, 5, 10, 5]
  assert told == [0, 1, 2] and shared.compiled() == 3


def test_layers_share_if_all_that_was_asked_has_the_same_answer():
  late = lambda index, depth: index >= 2

  def run(layer, x):
    return x + layer.ask(late) * 10 + layer.number

  shared = Shared(run)
  layers = [Layer(i, 4) for i in range(4)]
  out = [int(shared(layer, jnp.int32(0))) for layer in layers]
  assert out == [0, 1, 12, 13]
  assert shared.compiled() == 2
  shared(Layer(0, 4, heads=2), jnp.int32(0))
  shared(layers[0], jnp.zeros(3, jnp.int32))
  assert shared.compiled() == 4
