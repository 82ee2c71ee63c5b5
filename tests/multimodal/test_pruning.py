"""FastV, PyramidDrop, SparseVLM: cards, and slow decoders that do the same."""

import functools

import jax
import numpy as np
import pytest

from tests.decoder.models import config, decoder, params_of
from tests.multimodal import prompts, reference
from tests.multimodal.prompts import DEPTH, KINDS, MORE, NAMES, PROMPTS
from tokjax.models import generation
from tokjax.slots import Slots

CLOSE = dict(rtol=1e-4, atol=1e-4)
SLOW = {
  "fastv": lambda: reference.FastV(2, 0.5),
  "pyramiddrop": lambda: reference.PyramidDrop((1, 2, 3), (0.5, 0.25, 0.125)),
  "sparsevlm": lambda: reference.SparseVLM((1, 2), (12, 6)),
  "sparsevlm_plus": lambda: reference.SparseVLMPlus((1, 2), (12, 6), heads=2),
}
RECIPE = pytest.mark.parametrize("recipe", SLOW)


@functools.cache
def slow(recipe: str, example: str) -> reference.Result:
  cfg = config(depth=DEPTH)
  model = reference.Slow(cfg, params_of(cfg))
  more = MORE[:, NAMES.index(example)]
  return model.run(PROMPTS[example], KINDS[example], SLOW[recipe](), more)


def rated(recipe: str) -> tuple[str, ...]:
  """Examples in which the official rule is defined."""
  # PyramidDrop takes 0 of 3 tokens, SparseVLM has no text to rate an image.
  without = {
    "pyramiddrop": {"few"}, "sparsevlm": {"image"}, "sparsevlm_plus": {"image"}
  }  # fmt: skip
  return tuple(n for n in NAMES if n not in without.get(recipe, ()))


@RECIPE
def test_prefill_and_decode_are_those_of_a_slow_decoder(recipe):
  made = prompts.generator(prompts.slots_of(recipe))
  state = prompts.prefilled(made)
  found = [np.asarray(state.logits)]
  for token in MORE:
    state = generation.decode_step(made.model, made.params, state, token)
    found.append(np.asarray(state.logits))
  for name in rated(recipe):
    logits = np.stack([x[NAMES.index(name)] for x in found])
    np.testing.assert_allclose(
      logits, slow(recipe, name).logits, **CLOSE, err_msg=name
    )


@RECIPE
def test_kept_sets_and_caches_are_those_of_a_slow_decoder(recipe):
  model = decoder(prompts.slots_of(recipe), depth=DEPTH)
  params = {"params": params_of(config(depth=DEPTH))}
  ids, mask, kinds = prompts.packed()
  forward = jax.jit(
    lambda ids, mask, kind: model.apply(params, ids, mask=mask, kind=kind)
  )
  logits, out = forward(ids, mask, kinds)
  plans = [plan for made in out["plans"] for plan in made]
  for i, name in enumerate(NAMES):
    if name not in rated(recipe):
      continue
    last = np.flatnonzero(out["remains"][i])[-1]
    np.testing.assert_allclose(
      logits[i, last], slow(recipe, name).logits[0], **CLOSE, err_msg=name
    )
    kept, source = [], np.arange(prompts.LENGTH)
    for plan in plans:
      before = source[kinds[i, source] == prompts.V]
      at = np.asarray(plan.anchor[i])[np.asarray(plan.valid[i])]
      source = source[at]
      now = source[kinds[i, source] == prompts.V]
      if before.tolist() != now.tolist():
        kept.append(now.tolist())
    assert kept == slow(recipe, name).kept, name


@RECIPE
def test_alone_is_as_in_a_padded_batch_also_where_nothing_is_official(recipe):
  made = prompts.generator(prompts.slots_of(recipe))
  batch = prompts.prefilled(made)
  names = ["few"] + ["image"] * recipe.startswith("sparsevlm")
  for name in names:
    alone = prompts.prefilled(made, (name,))
    np.testing.assert_allclose(
      batch.logits[NAMES.index(name)], alone.logits[0], atol=1e-5
    )
  # A batch without visual tokens is read by the plain model.
  if recipe == "fastv":
    text = prompts.prefilled(made, ("text",))
    plain = prompts.generator(Slots()).prefill([PROMPTS["text"]])
    np.testing.assert_allclose(text.logits, plain.logits, atol=1e-5)
