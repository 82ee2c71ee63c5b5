"""XL3M: segments chosen by how certain a model is behind them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.key_context import entropies, key_context

LENGTHS, QUESTION, SEGMENT = (14, 9, 4), 3, 4
TOKEN = np.random.default_rng(0).integers(1, 50, (3, 14)).astype(np.int32)
TABLE = np.random.default_rng(1).normal(size=(50, 7)).astype(np.float32)


def model(ids, length):
  """Sums over the tokens so far; padding after `length` does not count."""
  real = jnp.arange(ids.shape[1])[None] < length[:, None]
  x = jnp.asarray(TABLE)[ids] * real[:, :, None]
  return jnp.cumsum(x, axis=1)


def spread_by_hand(tokens, over):
  """Of one sub-context without padding."""
  x = np.cumsum(TABLE[tokens].astype(np.float64), axis=0)
  p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
  each = -(p * np.log(p)).sum(axis=1)
  return each[-1] if over == "last" else each[-QUESTION:].mean()


def prompt_by_hand(tokens, keep, over):
  body, question = tokens[:-QUESTION], tokens[-QUESTION:]
  parts = [body[i : i + SEGMENT] for i in range(0, len(body), SEGMENT)]
  spread = [spread_by_hand([*part, *question], over) for part in parts]
  chosen = sorted(np.argsort(spread, kind="stable")[:keep])
  return [t for i in chosen for t in parts[i]] + question


@pytest.mark.parametrize(
  ("over", "keeps"), [("question", (2,)), ("last", (1, 9))]
)
def test_ragged_prompts_equal_plain_loops_one_by_one(over, keeps):
  length = jnp.asarray(LENGTHS)
  padded = np.where(np.arange(14)[None] < np.array(LENGTHS)[:, None], TOKEN, 49)
  options = dict(question=QUESTION, segment=SEGMENT, over=over)
  spread = jax.jit(functools.partial(entropies, model, **options))(
    jnp.asarray(padded), length
  )
  for keep in keeps:
    ids, sizes = jax.jit(
      functools.partial(key_context, model, keep=keep, **options)
    )(jnp.asarray(padded), length)
    assert ids.shape[1] == min(keep, 3) * SEGMENT + QUESTION
    for b, n in enumerate(LENGTHS):
      tokens = TOKEN[b, :n].tolist()
      want = prompt_by_hand(tokens, keep, over)
      assert ids[b, : sizes[b]].tolist() == want
      assert not ids[b, sizes[b] :].any()
      if keep == 9:
        assert want == tokens  # All segments: the prompt itself.
      alone = [*tokens[:-QUESTION][:SEGMENT], *tokens[-QUESTION:]]
      first = spread_by_hand(alone, over)
      np.testing.assert_allclose(spread[b, 0], first, rtol=1e-4)


def test_a_certain_prediction_is_chosen():
  """The two distributions (.9, .1) and (.5, .5)."""
  sure = jnp.log(jnp.asarray([[0.9, 0.1], [0.5, 0.5]]))
  logits = lambda ids, length: jnp.broadcast_to(
    sure[ids[:, :1] - 1], (*ids.shape, 2)
  )
  token = jnp.asarray([[2, 2, 1, 1, 2, 5]])
  options = dict(question=2, segment=2)
  spread = entropies(logits, token, jnp.asarray([6]), **options)
  np.testing.assert_allclose(spread, [[0.693, 0.325]], atol=1e-3)
  ids, size = jax.jit(
    lambda token: key_context(
      logits, token, jnp.asarray([6]), keep=1, **options
    )
  )(token)
  assert ids.tolist() == [[1, 1, 2, 5]]
  assert size.tolist() == [4]


def test_options_are_refused():
  token, length = jnp.ones((1, 8), jnp.int32), jnp.asarray([8])
  for options, message in (
    (dict(question=8, segment=2, keep=1), r"question=8: must lie in 1\.\.7"),
    (dict(question=2, segment=0, keep=1), "segment=0"),
    (dict(question=2, segment=2, keep=0), "keep=0"),
  ):
    with pytest.raises(ValueError, match=message):
      key_context(model, token, length, **options)
