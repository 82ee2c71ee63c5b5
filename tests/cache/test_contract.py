"""What every cache and attention recipe keeps to.

Names come from the registry. A recipe of tokjax without a reference fails; one
from elsewhere is held to everything but the comparison.
"""

import dataclasses

import jax
import numpy as np
import pytest

from tests.cache import cases, reference
from tests.cache.cases import DEPTH, LENGTHS, PROMPT, Case, case
from tests.decoder.models import decoder
from tokjax import recipes
from tokjax.cache.entries import physical_bytes
from tokjax.models import generation
from tokjax.models import prefill as prompting
from tokjax.signals import Values

CLOSE = {"rtol": 2e-4, "atol": 2e-4}


def each():
  """Names; tests of one recipe share a worker and its compilation."""
  mark = pytest.mark.xdist_group
  return [
    pytest.param(name, marks=mark(f"cache-{name}")) for name in cases.names()
  ]


EVERY = pytest.mark.parametrize("name", each(), scope="module")


def test_recipes_of_tokjax_have_a_reference():
  own = [name for name in cases.names() if reference.is_own(name)]
  assert len(own) > 30
  missing = [name for name in own if reference.find(name) is None]
  assert not missing, "; ".join(map(reference.how_to_write, missing))


@EVERY
def test_padded_prompts_equal_the_reference_one_by_one(name):
  function = reference.find(name)
  if function is None and not reference.is_own(name):
    pytest.skip(reference.how_to_write(name))
  assert function is not None, reference.how_to_write(name)
  c = case(name)
  for b, n in enumerate(LENGTHS):
    shared = {}
    for layer in range(DEPTH):
      layer_input = reference.layer_input(c, b, layer, shared)
      prompt, steps = function(layer_input)
      message = f"layer {layer}, example {b}"
      np.testing.assert_allclose(
        c.prefilled[layer, b, :n], prompt, err_msg=message, **CLOSE
      )
      np.testing.assert_allclose(
        c.decoded[:, layer, b], steps, err_msg=message, **CLOSE
      )


@EVERY
def test_bytes_are_those_of_the_buffers(name):
  c = case(name)
  *_, states, logical = c.result
  for layer, state, counted in zip(
    cases.layers(), states, logical, strict=True
  ):
    said = c.cache.bytes(layer, state)
    assert said.physical == physical_bytes(state)
    assert counted.shape == (len(LENGTHS),)
    assert (counted > 0).all()
    assert counted.sum() <= said.physical


@EVERY
def test_shapes_do_not_change_between_steps(name):
  before, after = case(name).result[2:4]
  assert jax.tree.structure(before) == jax.tree.structure(after)
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    assert a.shape == b.shape
    assert a.dtype == b.dtype


@EVERY
def test_other_garbage_and_a_second_call_change_nothing(name):
  c = case(name)
  again = c.run(garbage=1e30)
  assert c.program._cache_size() == 1
  for b, n in enumerate(LENGTHS):
    np.testing.assert_array_equal(again[0][:, b, :n], c.prefilled[:, b, :n])
  np.testing.assert_array_equal(again[1], c.decoded)


@EVERY
def test_slots_are_hashable_and_equal_when_built_again(name):
  c = case(name)
  again = cases.case.__wrapped__(name).slots
  assert again == c.slots
  assert hash(again) == hash(c.slots)


@EVERY
def test_a_build_is_checked(name):
  c = case(name)
  for layer in cases.layers():
    c.attend.check(layer, cases.PROMPT)
    c.cache.check(layer, c.attend, cases.PROMPT, cases.STEPS)


# Scores that look at values, or bits that values share: what far values are
# decides a little of what stands in the window.
LOOKS_AT_VALUES = ("expected_attention", "zipcache")


def looks_at_values(c: Case) -> bool:
  evict = getattr(c.cache, "evict", None)
  asked = () if evict is None else evict.asks
  return c.name in LOOKS_AT_VALUES or any(
    isinstance(question, Values) for question in asked
  )


@EVERY
def test_a_sliding_layer_looks_at_its_window_or_is_refused(name):
  """Values far behind, changed, change no output."""
  window, far = 3, 4
  free = far + window - 1  # The first query that sees none of them.
  c = Case(name, case(name).slots, window=window)
  try:
    for layer in c.layers:
      c.attend.check(layer, cases.PROMPT)
      c.cache.check(layer, c.attend, cases.PROMPT, cases.STEPS)
  except ValueError as refused:
    assert "window" in str(refused)
    return
  other = Case(name, c.slots, window=window, text=cases.TEXT.with_far(far))
  for b, n in enumerate(LENGTHS):
    np.testing.assert_allclose(
      c.prefilled[:, b, free:n], other.prefilled[:, b, free:n], rtol=1e-6,
      atol=1e-6,
    )  # fmt: skip
  if not looks_at_values(c):
    np.testing.assert_allclose(c.decoded, other.decoded, rtol=1e-6, atol=1e-6)


@EVERY
def test_what_a_sliding_layer_holds_does_not_grow(name):
  """With the prompt or with the text; other layers' states do."""
  slots, window = case(name).slots, 6
  plain = dataclasses.replace(cases.layers()[0], window=None)
  layer = dataclasses.replace(plain, window=window)
  size = lambda *of: physical_bytes(cases.held(slots, *of))
  try:
    c = Case(name, slots, window=window)
    c.attend.check(layer, cases.PROMPT)
    c.cache.check(layer, c.attend, cases.PROMPT, 4 * cases.PROMPT)
  except ValueError as refused:
    assert "window" in str(refused)
    return
  short, long = (size(layer, n, 2 * n) for n in (PROMPT, 2 * PROMPT))
  assert short == long < size(plain, PROMPT, 2 * PROMPT)


@EVERY
def test_one_token_is_a_prompt_or_refused(name):
  """With the recipe's own options, which are larger; shapes are enough.

  Where one token is less than what it protects, two are tried.
  """
  model = decoder(recipes.get(name))
  for n in (1, 2):
    ids = jax.ShapeDtypeStruct((1, n), np.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]

    def run(params, ids, model=model, n=n):
      length = np.full((1,), n, np.int32)
      going = generation.prefill(model, params, ids, length, 2)
      return generation.decode_step(model, params, going, ids[:, 0]).logits

    try:
      prompting.check(model, n, 2, None)
    except ValueError:
      continue  # What it protects is longer.
    logits = jax.eval_shape(run, params, ids)
    assert logits.shape == (1, model.config.vocabulary)
    break
