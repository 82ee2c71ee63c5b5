"""Sliding layers hold their window, whatever the recipe."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.cache import cases
from tests.cache.cases import LENGTHS, STEPS, Case, case
from tests.cache.test_forms import ALL
from tokjax import recipes
from tokjax.attention.block_memory import BlockMemory
from tokjax.cache.adaptive import Adaptive
from tokjax.cache.combine import ByHead
from tokjax.cache.entries import physical_bytes
from tokjax.cache.evict import Trim
from tokjax.cache.kivi import Kivi
from tokjax.cache.kv import KV
from tokjax.cache.low_rank import LowRank
from tokjax.cache.mixed import Mixed
from tokjax.cache.reads import Pages, Persistent
from tokjax.cache.retriever import Retriever
from tokjax.cache.scores import key_norm
from tokjax.cache.stores import Exact
from tokjax.layer import Layer
from tokjax.slots import Slots

# Shorter than all prompts and decoded tokens, and longer than the last of both.
WINDOWS = (5, 12)
FINE = {"rtol": 1e-5, "atol": 1e-5}
ROUGH = {"rtol": 0.1, "atol": 0.1}

# Recipes with room for all that is in sight: they give what the full cache
# gives, those with few bits about that.
KNORM = recipes.get("knorm", keep=1.0).cache
HOLDING_ALL = {
  "knorm": KNORM,
  "h2o": recipes.get("h2o", heavy=ALL, recent=ALL).cache,
  "reindexed": KV(
    dataclasses.replace(KNORM.evict), Exact(rotated=False), trim=Trim()
  ),
  "adakv": Adaptive(key_norm, ALL, 2),
  "quest": KV(read=Pages(ALL, 4, 1, 0)),
  "tidaldecode": KV(read=Persistent(ALL, (0,))),
  "infllm": Retriever(),
  "by head": ByHead((((1,), KNORM),), KV(store=Exact(rotated=False))),
  "kivi": KV(store=Kivi(8, 4, 4)),
  "knorm, kivi": dataclasses.replace(KNORM, store=Kivi(8, 4, 4)),
  "zipcache": Mixed((8, 8), 0.4, 2),
}


@pytest.fixture(scope="module")
def masked():
  """Decoded with all entries held, and a mask."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Layer, "in_sight", lambda self, tokens: tokens)
    full = Case("full", Slots(cache=KV()), window=WINDOWS)
    sizes = [s.store.room for s in full.result[2]]
    assert sizes == [cases.PROMPT + STEPS] * 2
    return full.decoded


@pytest.mark.parametrize("name", HOLDING_ALL)
def test_what_is_held_is_enough(name, masked):
  attend = BlockMemory(2, 64, ALL, 4, 2, 8) if name == "infllm" else None
  got = Case(name, Slots(attend=attend, cache=HOLDING_ALL[name]),
             window=WINDOWS)  # fmt: skip
  rough = "kivi" in name or name == "zipcache"
  np.testing.assert_allclose(got.decoded, masked, **(ROUGH if rough else FINE))
