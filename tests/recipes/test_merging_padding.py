"""A padded example comes out as it does alone, merged or clustered."""

import jax
import numpy as np
import pytest

from tests.recipes.sites_pruning import WIDTH, chain, rows, tokens_of
from tokjax import budgets, recipes

# Real tokens of the examples of a batch; two of them are compared alone.
LENGTHS, ALONE = (15, 10, 10, 2), slice(1, 3)
HALF = budgets.Ratio(0.6, (1, 2), "current", "ceil")
CASES = {
  "tome": {},
  "tome_kth": {},
  "tome_random": {},
  "pitome none": {"bsm_blocks": "none"},
  "pitome all": {"bsm_blocks": "all"},
  "mctf": {},
  "atc single": {"linkage": "single"},
  "atc complete": {"linkage": "complete"},
  "atc average": {"linkage": "average"},
  "dpc_knn": {"neighbours": 3},
  "kmedoids all": {"cost": "all"},
  "kmedoids members": {"cost": "members"},
  "token_transforming": {},
}


def padded(scattered: bool):
  """The batch; the second compared example is padded at the end."""
  n = max(LENGTHS)
  x = np.full((len(LENGTHS), n, WIDTH), 7.0, np.float32)
  mask = np.zeros(x.shape[:2], bool)
  for e, length in enumerate(LENGTHS):
    at = np.arange(1, length)
    if scattered and e != 2:
      at = np.sort(np.random.default_rng(e).permutation(n - 1)[at - 1] + 1)
    mask[e, 0] = mask[e, at] = True
    x[e, mask[e]] = rows(e, length, WIDTH)
  return tokens_of(x, mask)


def without_padding(tokens):
  mask = np.asarray(tokens.mask)

  def real(a):
    a = np.asarray(a)
    return jax.numpy.stack([a[e][mask[e]] for e in range(*ALONE.indices(4))])

  return tokens.replace(
    x=real(tokens.x),
    size=real(tokens.size),
    position=real(tokens.position),
    kind=real(tokens.kind),
    mask=None,
  )


@pytest.mark.parametrize("case", CASES)
def test_a_padded_example_equals_the_example_alone(case):
  slots = recipes.get(case.split()[0], budget=HALF, **CASES[case])
  # Noise belongs to a place, so what is random needs its padding at the end.
  tokens = padded(scattered=not slots.needs_key)
  keys = jax.random.split(jax.random.key(0), len(LENGTHS))
  run = jax.jit(lambda t, k: chain(slots, t, k, depth=3))
  together, alone = run(tokens, keys), run(without_padding(tokens), keys[ALONE])
  mask = np.asarray(together.mask)
  for e in range(2):
    for name in ("x", "size", "position", "kind"):
      np.testing.assert_allclose(
        getattr(together, name)[e + 1][mask[e + 1]],
        getattr(alone, name)[e],
        atol=1e-5,
        err_msg=name,
      )
  assert mask[3].sum() == 2, "a class token and one patch cannot merge"
  assert np.all(np.isfinite(together.x))
  if "kmedoids" not in case:
    real = tokens.mask.sum(1)
    np.testing.assert_allclose(
      np.where(mask, together.size, 0).sum(1), real, rtol=1e-5
    )
