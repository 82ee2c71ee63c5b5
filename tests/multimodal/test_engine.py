"""Reductions of any kind in a decoder, against slow decoders, ragged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoder.models import SLIDING, config, decoder, params_of
from tests.multimodal import prompts, reference
from tests.multimodal.prompts import DEPTH, KINDS, MORE, NAMES, PROMPTS, T, V
from tokjax import budgets, recipes
from tokjax.models import generation
from tokjax.reduce.back import Back
from tokjax.reduce.free import Free
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_top
from tokjax.signals import Derived, Last, Rows
from tokjax.slots import Slots

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
    assert [int(h[i]) for h in held] == slow.lengths, name
    logits = np.stack([x[i] for x in found])
    np.testing.assert_allclose(logits, slow.logits, **CLOSE, err_msg=name)
