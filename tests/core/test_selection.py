"""Tokens that stay, first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax import selection


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_partition_is_a_stable_sort(share):
  chosen = jnp.asarray(np.random.default_rng(0).random((5, 67)) < share)
  index, place = jax.vmap(selection.partition)(chosen)
  expected = np.argsort(~chosen, axis=1, kind="stable")
  np.testing.assert_array_equal(index, expected)
  np.testing.assert_array_equal(place, np.argsort(expected, axis=1))


def test_a_mask_becomes_indices_with_room_for_all_or_few():
  chosen = jnp.array([False, True, False, True, True])
  for k, expected in ((2, [1, 3]), (4, [1, 3, 4])):
    picked = selection.of_mask(chosen, k)
    assert picked.index.shape == (k,)
    np.testing.assert_array_equal(picked.index[picked.valid], expected)
  order = jnp.array([0, 9, 1, 5, 7])
  picked = selection.of_mask(chosen, 4, order=order)
  np.testing.assert_array_equal(picked.index[picked.valid], [3, 4, 1])
