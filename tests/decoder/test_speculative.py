"""Speculative decoding says what greedy decoding says, by any draft."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.decoder.models import SLIDING, config, decoder, params_of
from tokjax import recipes
from tokjax.cache import several
from tokjax.models import Generator, Speculative
from tokjax.models.decoder_block import attend_of, cache_of
from tokjax.models.decoder_programs import programs_of
from tokjax.slots import Slots

PROMPTS = [[3, 9, 4, 7, 5], [11, 2], [8, 8, 1, 6, 5, 4, 3]]
# One layer's window is full and its ring would have gone round.
SIZES = dict(capacity=8, decode=9, buckets=(8,))


def generator(slots=Slots(), seed=0, **changes):
  made = config(**SLIDING, **changes)
  params = params_of(made)
  if seed:
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
      lambda x: x + 0.05 * rng.normal(size=x.shape).astype(x.dtype), params
    )
  return Generator(decoder(slots, **SLIDING, **changes), params, **SIZES)


@pytest.fixture(scope="module")
def plain():
  return generator()


@pytest.fixture(scope="module")
def texts(plain):
  return plain.generate(PROMPTS)


@pytest.fixture(scope="module")
def drafts(plain):
  """Right, near and far from right: seeds of what is added to the weights."""
  return {
    "itself": plain,
    "near": generator(seed=1),
    "bad": generator(depth=1, mlp_dim=16),
  }


@pytest.mark.parametrize("name", ["itself", "near", "bad"])
def test_any_draft_gives_the_greedy_text(plain, texts, drafts, name):
  fast = Speculative(plain, drafts[name], ahead=3)
  found, said = fast.generate(PROMPTS)
  assert found == texts
  assert said.tokens.tolist() == [len(text) for text in texts]
  if name == "itself":
    # Rounds of the model's token and three that were guessed right.
    assert said.rounds.tolist() == [3, 3, 3]
  if name == "near":
    assert 1 < said.per_round < 4 and len(set(said.rounds.tolist())) > 1


def test_texts_end_alone_and_at_most(plain, texts, drafts):
  fast = Speculative(plain, drafts["near"], ahead=3)
  end = texts[0][3]
  cut = [t[: t.index(end) + 1] if end in t else t for t in texts]
  assert fast.generate(PROMPTS, ends=(end,))[0] == cut
  assert fast.generate(PROMPTS, most=5)[0] == [text[:5] for text in texts]
  assert fast.generate(PROMPTS, most=0)[0] == [[], [], []]
  # Alone, in a batch of the same size, so that nothing compiles again.
  programs = programs_of(fast._target.model)
  before = programs.compiled()
  for prompt, text in zip(PROMPTS, texts, strict=True):
    assert fast.generate([prompt] * 3)[0] == [text] * 3
  assert programs.compiled() == before


def test_one_program_says_the_same(plain, texts, drafts):
  whole = dataclasses.replace(plain, whole=True)
  bad = dataclasses.replace(drafts["bad"], whole=True)
  assert Speculative(whole, bad, ahead=2).generate(PROMPTS)[0] == texts


def test_what_is_evicted_at_the_end_of_the_prompt_stays_so():
  made = generator(recipes.get("snapkv", keep=0.5, window=2))
  fast = Speculative(made, generator(seed=1), ahead=2)
  assert fast.generate(PROMPTS)[0] == made.generate(PROMPTS)


@pytest.mark.parametrize(
  ("name", "reason"),
  [
    ("kivi", "does not hold rotated keys"), ("quest", "keeps an index"),
    ("h2o", "changes entries"), ("infllm", "no KV"),
  ],
)  # fmt: skip
def test_caches_that_cannot_be_set_back_are_refused(name, reason):
  slots = recipes.get(name)
  with pytest.raises(ValueError, match=f"'{name}', slot 'cache'.*{reason}"):
    several.check(cache_of(slots), attend_of(slots), name)


def test_pairs_that_cannot_be_are_refused(plain):
  with pytest.raises(ValueError, match="draft=None.*give one of the two"):
    Speculative(plain)
  with pytest.raises(ValueError, match="ahead=-1: must be 1 or more"):
    Speculative(plain, plain, ahead=-1)
  other = dataclasses.replace(
    plain, model=decoder(recipes.get("knorm"), **SLIDING)
  )
  Speculative(plain, other)
  h2o = dataclasses.replace(plain, model=decoder(recipes.get("h2o")))
  for pair in ((h2o, plain), (plain, h2o)):
    with pytest.raises(ValueError, match="'h2o', slot 'cache'.*cannot be"):
      Speculative(*pair)
  small = dataclasses.replace(plain, decode=2)
  with pytest.raises(ValueError, match="decode=2; the model has 8 and 9"):
    Speculative(plain, small)
  with pytest.raises(ValueError, match="'flash' fills 'draft'"):
    slots = recipes.get("flash", latents=2)
    made = dataclasses.replace(plain, model=decoder(slots))
    made.stream(made.prefill(PROMPTS))
