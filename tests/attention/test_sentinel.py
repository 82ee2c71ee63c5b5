"""Who sees whom around sentinel tokens."""

import numpy as np
import pytest

from tests.cache.by_hand import pairs
from tokjax.attention.sentinel import Sentinels


def test_a_sentinel_sees_its_chunk_and_others_see_sentinels():
  token = [1, 2, 9, 3, 4, 9]
  seen = pairs(Sentinels((9,)), 6, token=token)
  sees = lambda i: np.flatnonzero(seen[i]).tolist()
  assert sees(2) == [0, 1, 2]
  assert sees(5) == [3, 4, 5]
  assert sees(3) == [0, 1, 2, 3]
  assert sees(4) == [0, 1, 2, 3, 4]
  seen = pairs(Sentinels((9,), earlier=True), 6, token=token)
  assert sees(5) == [2, 3, 4, 5]
  causal = np.tril(np.ones((6, 6), bool))
  np.testing.assert_array_equal(pairs(Sentinels(), 6, token=token), causal)


def test_ids_are_refused():
  with pytest.raises(ValueError, match=r"tokens=\(-1,\): ids must be 0"):
    Sentinels((-1,))
