"""Reductions of any kind in a decoder, against slow decoders, ragged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.models import SLIDING, config, decoder, params_of
from tests.multimodal import prompts, reference
from tests.multimodal.prompts import DEPTH, KINDS, MORE, NAMES, PROMPTS, T, V
from tokjax import budgets, recipes, signals
from tokjax.attention import core
from tokjax.layer import Arrivals
from tokjax.models import decoder_slots, generation
from tokjax.models.decoder import layers_of
from tokjax.models.decoder_answers import DecoderAnswers
from tokjax.reduce.back import Back
from tokjax.reduce.free import Free
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_top
from tokjax.signals import Derived, Last, Rows
from tokjax.slots import Slots
from tokjax.tokens import Tokens

CLOSE = dict(rtol=1e-4, atol=1e-4)
OWN = keep_top(Rows(of=Last(), over="mean"))


def length(tokens):
  """Squared norms of hidden states."""
  return jnp.square(tokens.x).sum(axis=-1)


def visual(at, layer, share):
  return Reduce(OWN, budgets.Once(share, layer), at=at, free=Free((V,)))


def text(layer, share):
  free = Free((T,), last=1)
  return Reduce(OWN, budgets.Once(share, layer), at="output", free=free)


# Slots, what the slow decoder does, and changes of the architecture.
CASES = {
  "mlp": (
    Slots(visual("mlp", 1, 0.5)),
    lambda: reference.Top("between", 1, True, 0.5),
    {},
  ),
  "two_kinds": (
    Slots((visual("mlp", 1, 0.5), text(2, 0.5))),
    lambda: reference.Both(
      reference.Top("between", 1, True, 0.5),
      reference.Top("after", 2, False, 0.5, last=1),
    ),
    {},
  ),
  "bypass": (
    Slots(
      Reduce(
        keep_top(Derived(fn=length)),
        budgets.Once(0.5, 1),
        free=Free((T, V)),
        back=Back(until=2, fill="input"),
      )
    ),
    lambda: reference.Bypass(1, 3, 0.5),
    {},
  ),
  "sliding": (
    recipes.get("fastv"),
    lambda: reference.FastV(2, 0.5),
    SLIDING,
  ),
  "sliding_renumbered": (
    recipes.get("pyramiddrop"),
    lambda: reference.PyramidDrop((1, 2, 3), (0.5, 0.25, 0.125)),
    SLIDING,
  ),
}
CASE = pytest.mark.parametrize("case", CASES)


def entries(state) -> np.ndarray:
  """Valid entries of a block's cache, `[b]`."""
  return np.asarray(state.store.length[:, 0])


@CASE
def test_prefill_and_decode_equal_a_slow_decoder(case):
  slots, method, changes = CASES[case]
  made = prompts.generator(slots, **changes)
  state = prompts.prefilled(made)
  held = [entries(s) for s in state.states]
  found = [np.asarray(state.logits)]
  for token in MORE[:2]:
    state = generation.decode_step(made.model, made.params, state, token)
    found.append(np.asarray(state.logits))
  cfg = config(depth=DEPTH, **changes)
  for i, name in enumerate(NAMES):
    if case == "sliding_renumbered" and name == "few":
      continue  # The official rule leaves nothing of three tokens.
    slow = reference.Slow(cfg, params_of(cfg)).run(
      PROMPTS[name], KINDS[name], method(), MORE[:2, i]
    )
    # Of what is left of a prompt a sliding layer holds its window.
    sights = [cfg.window_of(block) or n for block, n in enumerate(slow.lengths)]
    lengths = [min(n, w) for n, w in zip(slow.lengths, sights, strict=True)]
    assert [int(h[i]) for h in held] == lengths, name
    logits = np.stack([x[i] for x in found])
    np.testing.assert_allclose(logits, slow.logits, **CLOSE, err_msg=name)


def test_a_bypass_gives_back_in_a_whole_sequence_too():
  slots, method, _ = CASES["bypass"]
  model = decoder(slots, depth=DEPTH)
  params = {"params": params_of(config(depth=DEPTH))}
  ids, mask, kinds = prompts.packed()
  logits, out = jax.jit(
    lambda ids, mask, kind: model.apply(params, ids, mask=mask, kind=kind)
  )(ids, mask, kinds)
  np.testing.assert_array_equal(out["remains"], mask)
  for i, name in enumerate(NAMES):
    model = reference.Slow(config(depth=DEPTH), params["params"])
    slow = model.run(PROMPTS[name], KINDS[name], method())
    for logit, token in zip(logits[i], slow.tokens, strict=False):
      np.testing.assert_allclose(
        logit, model.logits(token), **CLOSE, err_msg=name
      )


def test_long_windows_go_by_position_where_tokens_were_removed(monkeypatch):
  """Kernels that tell distances by place must not be asked then."""
  slots, method, changes = CASES["sliding"]
  monkeypatch.setattr(core, "LONG", 16)
  # The window of the last token reaches into the image.
  changes = {**changes, "depth": 3, "window": 14}
  changes["layers"] = ("full", "full", "sliding")
  made = prompts.generator(slots, **changes)
  state = prompts.prefilled(made, ("long",))
  cfg = config(**changes)
  slow = reference.Slow(cfg, params_of(cfg)).run(
    PROMPTS["long"], KINDS["long"], method()
  )
  np.testing.assert_allclose(state.logits, slow.logits, **CLOSE)


def test_what_is_removed_inside_a_bypass_comes_back_with_it():
  around = CASES["bypass"][0].reduce[0]
  inside = dataclasses.replace(
    around, budget=budgets.Once(0.25, 2), back=None
  )
  back = Back(until=1, fill="input")
  nested = Slots((around, dataclasses.replace(inside, back=back)))
  model = decoder(nested, depth=DEPTH)
  behind = Slots((around, visual("input", 3, 0.5)))
  for slots in (Slots((around, inside)), behind):
    decoder(slots, depth=DEPTH)
  alone = decoder_slots.stages_of(
    Slots((around, inside)), model.config, 32, ((V, 32),)
  )
  left = [decoder_slots.arriving(alone, i, 32) for i in range(DEPTH)]
  assert left[3] == 32 > left[1] > left[2]
  stages = decoder_slots.stages_of(nested, model.config, 32, ((V, 32),))
  # Behind it all are there again, and one kind may go alone.
  counts = [decoder_slots.arriving(stages, i, 32) for i in range(DEPTH)]
  assert counts[0] == counts[3] == 32 and counts[1] > counts[2]


def test_a_prompt_too_short_for_the_second_of_two_reductions_is_fine():
  first = visual("input", 1, 0.5)
  second = dataclasses.replace(first, budget=budgets.Once(budgets.Count(8), 2))
  slots = Slots((first, second))
  cfg = decoder(slots, depth=DEPTH).config
  stages = decoder_slots.stages_of(slots, cfg, 16, ((V, 12), (T, 4)))
  assert [len(block) for block in stages] == [0, 1, 0, 0]


def test_answers_of_a_block_agree_with_its_whole_attention_map():
  cfg = config()
  facts = layers_of(cfg, jnp.float32)[0]
  n, real = 6, np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], bool)
  rng = np.random.default_rng(0)
  draw = lambda h: jnp.asarray(rng.normal(size=(2, n, h, 8)), jnp.float32)
  position = jnp.broadcast_to(jnp.arange(n), (2, n))
  arrivals = Arrivals(draw(4), draw(2), draw(2), position, jnp.asarray(real))
  kind = jnp.asarray([[T, V, V, T, T, T], [V, T, T, T, T, T]], jnp.int32)
  one = jnp.ones((2, n))
  tokens = Tokens(draw(1)[:, :, 0], one, one[..., None], kind, arrivals.valid)
  none = signals.Answers()
  told = DecoderAnswers(facts, arrivals.clean(), tokens, none)
  weight = Derived(fn=length)
  asked = (
    signals.Attention(), signals.Received(), Rows(of=Last(2)),
    Rows(of=signals.Of((V,))), Rows(of=signals.By(weight)), weight,
  )  # fmt: skip
  answers = jax.jit(lambda: told.add_to(none, asked))()
  whole = np.asarray(answers[asked[0]])
  np.testing.assert_allclose(
    whole.sum(-1), np.broadcast_to(real[:, None], whole.shape[:3]), atol=1e-6
  )
  mass = np.asarray(length(tokens)) * real
  for question, rows in (
    (asked[1], real),
    (asked[2], [[0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0]]),
    (asked[3], real & (np.asarray(kind) == V)),
    (asked[4], mass),
  ):
    rows = np.asarray(rows, np.float64)
    rows = rows / rows.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
      answers[question], np.einsum("bhqk,bq->bhk", whole, rows), atol=1e-5
    )
