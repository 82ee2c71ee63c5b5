"""Generation: ragged batches, buckets, ends, and input that cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.models import config, decoder, params_of
from tokjax.models import Generator, Sampler
from tokjax.models.decoder_programs import programs_of

PROMPTS = [[3, 9, 4, 7, 5], [11, 2], [8, 8, 1, 6, 5, 4, 3]]


@pytest.fixture(scope="module")
def made():
  return Generator(
    decoder(), params_of(config()), capacity=16, decode=6, buckets=(8, 16)
  )


@pytest.fixture(scope="module")
def together(made):
  return made.generate(PROMPTS)


def test_a_ragged_batch_equals_each_prompt_alone(made, together):
  # Alone, but in a batch of the same size, so that nothing compiles again.
  for prompt, text in zip(PROMPTS, together, strict=True):
    assert len(text) == 6
    assert made.generate([prompt] * 3) == [text] * 3


def test_greedy_text_is_what_the_plain_pass_says(made, together):
  whole = [*PROMPTS[0], *together[0]]
  forward = jax.jit(lambda p, x: made.model.apply({"params": p}, x)[0])
  logits = forward(made.params, jnp.array([whole]))
  said = np.asarray(logits)[0].argmax(-1)
  np.testing.assert_array_equal(said[4:-1], together[0])


def test_one_compilation_for_each_bucket(made, together):
  programs = programs_of(made.model)
  before = programs.compiled()
  made.generate([[1] * n for n in (3, 8, 5)])
  made.generate([[2], [5, 4], [4]])
  assert before > 0 and programs.compiled() == before
  assert [made.bucket(n) for n in (1, 8, 9, 16)] == [8, 8, 16, 16]


def test_a_text_ends_and_the_others_go_on(made, together):
  end = together[0][2]
  first = together[0].index(end) + 1
  texts = made.generate(PROMPTS, ends=(end,))
  assert texts[0] == together[0][:first]
  for text, whole in zip(texts[1:], together[1:], strict=True):
    cut = whole.index(end) + 1 if end in whole else len(whole)
    assert text == whole[:cut]


def test_draws_do_not_depend_on_the_neighbours(made):
  sampler, key = Sampler(temperature=1.0, top_k=5), jax.random.key(3)
  draw = lambda prompts: made.generate(prompts, sampler=sampler, key=key)
  assert draw(PROMPTS)[1] == draw([PROMPTS[2], PROMPTS[1], PROMPTS[0]])[1]
  assert draw(PROMPTS) == draw(PROMPTS)


@pytest.mark.parametrize(
  "prompts, message",
  [
    ([], "no prompts"),
    ([[1], []], "prompt 1 is empty"),
    ([[1] * 17], "17 tokens, the capacity is 16.*capacity=17"),
  ],
)
def test_bad_prompts(made, prompts, message):
  with pytest.raises(ValueError, match=message):
    made.generate(prompts)


def test_ids_outside_the_vocabulary_are_refused(made):
  """They would read rows of NaN, and give texts of zeros."""
  size = made.model.config.vocabulary
  for wrong in (-1, size, 10**12):
    message = f"id {wrong}; .* vocabulary has {size}"
    with pytest.raises(ValueError, match=message):
      made.generate([[1, 2], [3, wrong]])


def test_empty_requests(made):
  assert made.generate(PROMPTS, most=0) == [[], [], []]
  with pytest.raises(ValueError, match="most=-1: must be 0 or more"):
    made.generate(PROMPTS, most=-1)
  with pytest.raises(ValueError, match="no prompts"):
    made.generate([])


def test_a_generation_is_used_once(made):
  going = made.prefill(PROMPTS)
  assert len(list(made.stream(going, most=2))) == 2
  with pytest.raises(ValueError, match="used up"):
    made.stream(going)


def test_bad_options(made):
  with pytest.raises(ValueError, match="room for decode=6"):
    made.generate(PROMPTS, most=7)
  with pytest.raises(ValueError, match="capacity=0"):
    Generator(made.model, made.params, capacity=0, decode=1)
  with pytest.raises(ValueError, match="chunk=0"):
    Generator(made.model, made.params, capacity=8, decode=1, chunk=0)
