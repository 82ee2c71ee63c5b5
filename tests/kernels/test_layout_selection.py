"""Layouts from block scores keep the blocks that their rule says."""

import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels import layout as layouts

Q_LEN, K_LEN = 22, 19
SIZES = {"block_q": 4, "block_k": 3}
LENGTHS = {"q_len": Q_LEN, "k_len": K_LEN}

SCORES = st.builds(
  lambda seed, ties: _scores(seed, ties), st.integers(0, 10**6), st.booleans()
)
RULES = (
  layouts.TopK(3),
  layouts.TopP(0.6),
  layouts.TopP(0.9, capacity=2),
  layouts.Threshold(0.7),
  layouts.Threshold(0.2, capacity=4),
)


def _scores(seed, ties):
  scores = np.random.default_rng(seed).random((2, 2, 6, 7)).astype(np.float32)
  return np.round(scores * 3) / 4 if ties else scores


@functools.partial(jax.jit, static_argnums=1)
def _selected(scores, rule):
  layout = layouts.from_scores(
    scores,
    rule,
    pattern=layouts.Causal(),
    keep=layouts.Sinks(4),
    **LENGTHS,
    **SIZES,
  )
  return layout.kinds(), layout.to_dense(), layout.dropped


def _wanted(scores, allowed, kept, rule):
  """Blocks chosen from one row, in order, before capacity."""
  scores = np.where(allowed, scores, -np.inf)
  scores = np.where(kept & allowed, np.inf, scores)
  order = [j for j in np.argsort(-scores, kind="stable") if allowed[j]]
  if isinstance(rule, layouts.TopK):
    return order[: rule.k]
  if isinstance(rule, layouts.Threshold):
    return [j for j in order if scores[j] >= rule.value]
  mass = np.where(np.isfinite(scores), scores, 0).astype(np.float64)
  chosen = []
  for j in order:
    kept = np.isposinf(scores[j])
    if chosen and not kept and sum(mass[chosen]) >= rule.p * sum(mass) - 1e-6:
      break
    chosen.append(j)
  return chosen


@pytest.mark.parametrize("rule", RULES, ids=str)
@hypothesis.given(SCORES)
@hypothesis.settings(max_examples=10)
def test_rules_choose_what_they_say(rule, scores):
  pattern = layouts.Causal()
  shown = layouts.block_kinds(pattern, 4, 3, Q_LEN, K_LEN)[0] > 0
  kept = layouts.block_kinds(layouts.Sinks(4), 4, 3, Q_LEN, K_LEN)[0] > 0
  causal = np.arange(K_LEN)[None, :] <= np.arange(Q_LEN)[:, None]
  kinds, dense, dropped = _selected(scores, rule)
  capacity = getattr(rule, "capacity", None) or 7
  expected, lost = np.zeros(scores.shape, bool), np.zeros((2, 2), int)
  for at in np.ndindex(2, 2, 6):
    chosen = _wanted(scores[at], shown[at[2]], kept[at[2]], rule)
    expected[at][chosen[:capacity]] = True
    lost[at[:2]] += max(0, len(chosen) - capacity)
  np.testing.assert_array_equal(kinds > 0, expected)
  np.testing.assert_array_equal(dropped, lost)
  wide = np.repeat(np.repeat(expected, 4, 2), 3, 3)[..., :Q_LEN, :K_LEN]
  np.testing.assert_array_equal(dense, wide & causal)


def test_nan_and_hidden_scores_are_never_chosen():
  scores = np.full((1, 6, 7), np.nan, np.float32)
  scores[0, :, 2] = -1.0
  layout = layouts.from_scores(scores, layouts.TopK(4), **LENGTHS, **SIZES)
  np.testing.assert_array_equal(
    np.asarray(layout.kinds())[0], np.eye(7)[[2] * 6] * 2
  )
