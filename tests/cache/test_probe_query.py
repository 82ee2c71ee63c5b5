"""ActQKV: probes, the shares of layers, and how dense layers are measured."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache import reference
from tests.cache.cases import DEPTH, LENGTHS, case
from tests.cache.reference import probes
from tokjax import recipes
from tokjax.attention.probe_query import Usual, densities_of, probe, shares
from tokjax.layer import Layer


def test_unusual_queries_weigh_most():
  q = np.ones((4, 2), np.float32)
  alike = jnp.asarray([True, True, False, True])
  usual = Usual.empty(2).seen(jnp.asarray(q), alike)
  np.testing.assert_allclose(probe(usual, jnp.asarray(q), alike), [1, 1])
  q[1] = 5.0  # An outlier of deviation 3 among two of 1 each.
  usual = Usual.empty(2).seen(jnp.asarray(q), alike)
  found = probe(usual, jnp.asarray(q), alike)
  weight = np.array([(4 / 3) ** 2, (8 / 3) ** 2, (4 / 3) ** 2])
  weight /= weight.sum()
  np.testing.assert_allclose(found, weight @ [[1, 1], [5, 5], [1, 1]], 1e-6)


def test_nothing_valid_changes_nothing():
  usual = Usual.empty(2).seen(jnp.ones((3, 2)), jnp.ones((3,), bool))
  again = usual.seen(jnp.full((3, 2), 9.0), jnp.zeros((3,), bool))
  for old, new in zip(usual, again, strict=True):
    np.testing.assert_array_equal(old, new)


def shared(count, blocks, densities, least):
  of = shares(jnp.int32(count), jnp.int32(blocks), densities, least)
  return [int(x) for x in of]


def test_dense_layers_read_more():
  assert shared(4, 99, (0.9, 0.9, 0.9), 1) == [4, 4, 4]
  assert shared(4, 99, (1.0, 2.0, 3.0), 1) == [2, 4, 6]
  assert shared(4, 99, (1.0, 1.0, 8.0), 3) == [3, 3, 6]  # 6 of at most 8.
  assert shared(4, 5, (1.0, 1.0, 8.0), 32) == [5, 5, 5]


@pytest.mark.xdist_group("cache-actqkv")
def test_densities_are_measured():
  found = densities_of(case("actqkv").result[3])
  entropies = [[], []]
  for b in range(len(LENGTHS)):
    common = {}
    for layer in range(DEPTH):
      probes.actqkv(reference.layer_input(case("actqkv"), b, layer, common))
      entropies[layer] += common["densities"][layer]
  np.testing.assert_allclose(found, [np.mean(e) for e in entropies], 1e-5)


def test_options_are_refused():
  with pytest.raises(ValueError, match="least=0: must be 1 or more"):
    recipes.get("actqkv", least=0)
  with pytest.raises(ValueError, match="densities=.*above 0"):
    recipes.get("actqkv", densities=(1.0, 0.0))
  with pytest.raises(ValueError, match="2 given for 3 layers"):
    recipes.get("actqkv", densities=(1.0, 1.0)).attend.check(Layer(0, 3), 9)
