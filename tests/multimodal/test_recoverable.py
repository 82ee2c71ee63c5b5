"""Recoverable compression against the official code's loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import recipes, scores
from tokjax.recipes.multimodal.recoverable import ATTENDED, TEXT, as_one_head
from tokjax.reduce.site import Site
from tokjax.signals import Answers
from tokjax.tokens import Kind, Tokens

N, WORDS, WIDTH = 60, 4, 40


def outliers(values, k):
  """How many have a local outlier factor above 1.5."""
  n = len(values)
  k = min(k, n - 1)
  near = [
    sorted((abs(a - b), j) for j, b in enumerate(values) if j != i)[:k]
    for i, a in enumerate(values)
  ]
  reach = [own[-1][0] for own in near]
  density = [
    1 / (np.mean([max(d, reach[j]) for d, j in own]) + 1e-10) for own in near
  ]
  factor = [
    np.mean([density[j] for _, j in own]) / density[i]
    for i, own in enumerate(near)
  ]
  return sum(f > 1.5 for f in factor)


def slow(score, x, text, width, neighbours, room):
  """Outputs, one row a token."""
  n = len(x)
  best = lambda values, among, count: sorted(among, key=lambda i: -values[i])[
    :count
  ]
  unit = lambda a: a / np.linalg.norm(a, axis=-1, keepdims=True)
  like = unit(x) @ unit(text.mean(axis=0))
  seen = best(score, range(n), outliers(score, 20))
  like[seen] = like.min()
  left = [i for i in range(n) if i not in seen]
  told = best(like, left, len(left) * outliers(like, 20) // n)
  others = [i for i in left if i not in told]
  size = len(seen) + len(told) if width is None else width
  many = size * outliers(score[others], 10) // len(others)
  centres = best(score, others, many)
  # Room for the last token is set apart.
  told = sorted(told, key=lambda i: -score[i])
  chosen = [*seen, *told, *centres][: room - 1]
  kept = sorted(i for i in chosen if i not in centres)
  centres = [i for i in centres if i in chosen]
  rows = [x[i] for i in kept]
  for i in centres:
    near = [j for j in others if j != i]
    value = {j: unit(x[i]) @ unit(x[j]) + TEXT * like[j] for j in near}
    near = sorted(near, key=lambda j: -value[j])[:neighbours]
    rows.append(x[i] + sum(score[j] * x[j] for j in near))
  rest = [i for i in range(n) if i not in kept and i not in centres]
  if rest and (centres or not kept):
    rows.append(sum(score[i] * x[i] for i in rest))
  return np.array(rows), len(seen), len(told), len(centres)


@pytest.fixture(scope="module")
def compress():
  """The rule over an image, words behind it and padding, by options."""
  kind = [Kind.VISUAL] * N + [Kind.TEXT] * WORDS + [Kind.VISUAL] * 6
  kind = jnp.asarray(kind, jnp.int32)
  mask = jnp.arange(len(kind)) < N + WORDS

  def run(score, x, room, **options):
    (reduce,) = recipes.get("recoverable", **options).reduce

    @jax.jit
    def outputs(score, x):
      own = ATTENDED.answered(0)
      site = Site(
        Tokens.create(x, kind=kind, mask=mask), Answers().add(own, score), 50,
        due=jnp.int32(room), free_at=mask & (kind == Kind.VISUAL),
      )  # fmt: skip
      plan = reduce.rule(site)
      return plan.apply(x), plan.valid

    return outputs

  return run


def drawn(seed):
  rng = np.random.default_rng(seed)
  score = rng.random(N + WORDS + 6) ** 4
  # Outliers of both kinds.
  score[rng.integers(0, N, 5)] += rng.random(5) * 3
  score = (score / score.sum()).astype(np.float32)
  x = rng.normal(size=(len(score), 7)).astype(np.float32)
  x[rng.integers(0, N, 3)] += 3 * x[N : N + WORDS].sum(axis=0)
  return score, x


@pytest.mark.parametrize(
  ("width", "neighbours", "room"), [(WIDTH, 5, 50), (None, 32, 50), (30, 5, 9)]
)
def test_outputs_are_those_of_a_slow_version(
  compress, width, neighbours, room
):
  run, counts = None, []
  for seed in range(8):
    score, x = drawn(seed)
    run = run or compress(
      score, x, room, width=width, neighbours=neighbours
    )
    found, valid = jax.device_get(run(score, x))
    expected, *own = slow(
      score[:N].astype(np.float64), x[:N].astype(np.float64),
      x[N : N + WORDS].astype(np.float64), width, neighbours, room,
    )  # fmt: skip
    np.testing.assert_allclose(found[valid], expected, rtol=1e-4, atol=1e-5)
    counts.append(own)
    assert len(expected) <= room
  most = np.array(counts).max(axis=0)
  # Centres are the first to go where there is no room.
  assert (most[:2] > 0).all() and (most[2] > 0) == (room == 50), counts


def test_heads_are_taken_as_one_of_the_full_width():
  rng = np.random.default_rng(1)
  q, k = rng.normal(size=(3, 4)), rng.normal(size=(5, 3, 4))
  logits = np.einsum("hd,nhd->hn", q, k) / 2
  whole = k.reshape(5, 12) @ q.reshape(12) / 12**0.5
  expected = np.exp(whole) / np.exp(whole).sum()
  np.testing.assert_allclose(as_one_head(jnp.asarray(logits)), expected, 1e-5)


def test_local_outliers_of_few_numbers():
  values = jnp.asarray([0.0, 0.1, 0.2, 0.3, 5.0, 9.0])
  run = jax.jit(
    lambda mask: scores.local_outliers(values, 2, mask=mask)
  )
  assert run(jnp.arange(6) < 5).tolist() == [False] * 4 + [True, False]
  assert not run(jnp.arange(6) < 1).any()


@pytest.mark.parametrize("options", [{"width": 0}, {"neighbours": 0}])
def test_options_out_of_range(options):
  with pytest.raises(ValueError, match="must be 1 or more"):
    recipes.get("recoverable", **options)
