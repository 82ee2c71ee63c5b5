"""Laws next to the reference: identity, composition, training, dtypes.

One layer is enough here, which compiles in half the time.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache import cases
from tests.cache.cases import LENGTHS, Case, case
from tokjax import budgets, recipes
from tokjax.attention import core
from tokjax.attention.block_memory import BlockMemory
from tokjax.attention.estimated import Antidiagonal
from tokjax.attention.head_chunks import HeadChunks
from tokjax.attention.landmark import Landmark
from tokjax.attention.soft_vote import SoftVote
from tokjax.attention.static import Band
from tokjax.cache.combine import ByHead, ByLayer
from tokjax.cache.entries import physical_bytes
from tokjax.cache.kivi import Kivi
from tokjax.cache.kv import KV
from tokjax.cache.reads import Pages
from tokjax.cache.retriever import Retriever
from tokjax.cache.shared_pages import SharedPages
from tokjax.cache.trim import Trim
from tokjax.layer import Memory
from tokjax.slots import Slots

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ALL = budgets.Count(99)


def prompts(outs):
  """Outputs of real prompt tokens, `[depth, tokens, H, D]`."""
  return np.concatenate([outs[:, b, :n] for b, n in enumerate(LENGTHS)], 1)


def evicting():
  """Recipes that evict once, one of each kind of cache and budget."""
  found = {}
  for name in recipes.names("cache"):
    cache = recipes.get(name, **cases.options_of(name)).cache
    if "budget" in recipes.find(name).options and not getattr(
      cache, "trim", None
    ):
      budget = getattr(getattr(cache, "evict", cache), "budget", None)
      found.setdefault((type(cache), type(budget)), name)
  return sorted(found.values())


@pytest.mark.parametrize("name", evicting())
def test_keeping_everything_is_the_full_cache(name):
  slots = recipes.get(name, keep=1.0, **cases.options_of(name))
  got = Case(name, slots, depth=1)
  np.testing.assert_allclose(
    got.decoded[:, 0], case("full").decoded[:, 0], rtol=1e-6, atol=1e-6
  )


WIDE = {
  "streaming_llm": recipes.get("streaming_llm", first=2, budget=ALL),
  "h2o": recipes.get("h2o", heavy=ALL, recent=ALL),
  "quest": Slots(cache=KV(read=Pages(ALL, 4, 1, 0))),
  "delta": Slots(cache=KV(read=SharedPages(ALL, 4, 1, (0,)))),
  "xattention": Slots(attend=Antidiagonal(1.0, 2, 4)),
  "infllm": Slots(attend=BlockMemory(2, 64, ALL, 4, 2, 8), cache=Retriever()),
  "tokenselect": Slots(attend=SoftVote(2, 6, ALL, 4), cache=Retriever()),
  "longheads": Slots(attend=HeadChunks(ALL, 4), cache=Retriever()),
}


@pytest.mark.parametrize("name", WIDE)
def test_room_for_all_is_dense_attention(name):
  got, full = Case(name, WIDE[name], depth=1), case("full")
  np.testing.assert_allclose(
    prompts(got.prefilled), prompts(full.prefilled[:1]), **CLOSE
  )
  np.testing.assert_allclose(got.decoded[:, 0], full.decoded[:, 0], **CLOSE)


BLOCKED = (
  "h2o",
  "streaming_llm",
  "minference_a_shape",
  "minference_vertical_slash",
  "xattention",
)


@pytest.mark.parametrize("name", [*BLOCKED, "h2o by heads"])
def test_long_prompts_go_by_blocks_to_the_same(name, monkeypatch):
  rows = case(name.split()[0])
  rows.result  # noqa: B018 Compiled before the bound is patched.
  slots = rows.slots
  if name not in BLOCKED:
    slots = Slots(cache=ByHead((((1,), slots.cache),), slots.cache))
  monkeypatch.setattr(core, "LONG", 2)
  got = Case(f"{name} by blocks", slots)
  np.testing.assert_allclose(
    prompts(got.prefilled), prompts(rows.prefilled), **CLOSE
  )
  np.testing.assert_allclose(got.decoded, rows.decoded, **CLOSE)


def test_landmarks_are_read_as_they_were_trained():
  """All blocks by gathering them, and all blocks by a dense softmax."""
  dense, gathered = (
    Case("landmark", Slots(attend=Landmark(4, budget), cache=Retriever()), 1)
    for budget in (None, ALL)
  )
  np.testing.assert_allclose(
    prompts(dense.prefilled), prompts(gathered.prefilled), **CLOSE
  )
  np.testing.assert_allclose(dense.decoded, gathered.decoded, **CLOSE)


def test_layers_and_heads_may_differ():
  knorm, full = case("knorm"), case("full")
  cache = ByLayer((((0,), knorm.slots.cache),), KV())
  mixed = Case("mixed", Slots(cache=cache))
  np.testing.assert_allclose(mixed.decoded[:, 0], knorm.decoded[:, 0], **CLOSE)
  np.testing.assert_allclose(mixed.decoded[:, 1], full.decoded[:, 1], **CLOSE)


def test_heads_with_choices_of_their_own():
  """Each part hands on to its own heads; equal parts are the cache alone."""
  alone = case("tidaldecode")
  cache = alone.slots.cache
  parted = Case("parted", Slots(cache=ByHead((((0,), cache),), cache)))
  np.testing.assert_allclose(parted.decoded, alone.decoded, **CLOSE)
  first = ByHead((((0,), cache),), cache)
  swapped = ByLayer((((0,), first),), ByHead((((0, 1), cache),), KV()))
  with pytest.raises(ValueError, match="no earlier layer chose"):
    Case("swapped", Slots(cache=swapped)).decoded  # noqa: B018


def test_eviction_and_few_bits_compose():
  """Eight bits are nearly exact; the packed buffers are what is there."""
  snap = case("snapkv").slots.cache
  fine = dataclasses.replace(snap, store=Kivi(8, 4, 8))
  got = Case(
    "snapkv in 8 bits", Slots(attend=Band(2, ALL), cache=fine), depth=1
  )
  exact = case("snapkv")
  np.testing.assert_allclose(
    got.decoded[:, 0], exact.decoded[:, 0], rtol=0.1, atol=0.1
  )
  coarse = dataclasses.replace(snap, store=Kivi(2, 8, 8))
  layer = cases.layers()[0]

  def state(cache):
    def make():
      s = cache.init(layer, 3, 512, 16)
      return jax.tree.leaves(cache.compress(layer, s, {}, {}))

    return jax.eval_shape(make)

  sizes = [
    physical_bytes(state(cache))
    for cache in (KV(), snap, coarse, KV(store=Kivi(2, 8, 8)))
  ]
  assert sizes[2] < sizes[1] < sizes[0]
  assert sizes[2] < sizes[3] < sizes[0]


def test_retrieval_heads_keep_everything():
  options = cases.options_of("razor_attention")
  slots = recipes.get("razor_attention", keep=0.5, retrieval=(1,), **options)
  got, full = Case("razor", slots, depth=1), case("full")
  razor = case("razor_attention")
  np.testing.assert_allclose(
    got.decoded[:, 0, :, 2:], full.decoded[:, 0, :, 2:], **CLOSE
  )
  np.testing.assert_allclose(
    got.decoded[:, 0, :, :2], razor.decoded[:, 0, :, :2], **CLOSE
  )


@pytest.mark.parametrize("name", ["landmark_attention", "lococo"])
def test_what_is_learned_has_gradients(name):
  small = cases.options_of(name)
  c = Case(name, recipes.get(name, **small), depth=1)
  layer = c.layers[0]
  a = c.arguments(garbage=1e30)[0][0][0]

  def loss(params, v):
    b = dataclasses.replace(a, v=v).clean()
    if name == "lococo":
      state = c.cache.init(layer, len(LENGTHS), cases.PROMPT, 0)
      out, _, _ = c.cache.prefill(
        layer, state, b, attend=c.attend, params=params, carry={}, last=True
      )
    else:
      out, _ = c.attend(layer, b, Memory.of(b), params=params, carry={})
    return jnp.where(a.valid[:, :, None, None], out, 0.0).sum()

  of_params, of_v = jax.jit(
    jax.grad(loss, (0, 1)), compiler_options=cases.QUICK
  )(c.params(layer), a.v)
  for g in [*jax.tree.leaves(of_params), of_v]:
    assert np.isfinite(g).all()
    assert np.abs(g).max() > 0
  assert not np.asarray(of_v)[~np.asarray(a.valid)].any()


@pytest.mark.parametrize("name", cases.names())
def test_caches_and_outputs_have_the_layer_s_dtype(name):
  c = dataclasses.replace(case(name), depth=1, dtype=jnp.bfloat16)
  half = lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x
  prompts_, steps, params = c.arguments()
  args = jax.tree.map(half, (prompts_, steps))
  outs = lambda *args: c.life(*args)[:2]
  prefilled, decoded = jax.eval_shape(outs, *args, params)
  assert prefilled.dtype == decoded.dtype == jnp.bfloat16


def refused(slots, message, prompt=cases.PROMPT):
  c = Case("refused", slots)
  with pytest.raises(ValueError, match=message):
    for layer in cases.layers():
      c.attend.check(layer, prompt)
      c.cache.check(layer, c.attend, prompt, cases.STEPS)


def test_what_cannot_be_is_refused_with_the_reason():
  snap = recipes.get("snapkv", budget=budgets.Count(20), window=4).cache
  trim = dataclasses.replace(snap, trim=Trim())
  refused(recipes.get("snapkv", keep=0.5), "keeps 16 of 32.*64.*protect fewer")
  refused(recipes.get("adakv", keep=0.5), "keeps 16 of 32.*window=32")
  refused(recipes.get("streaming_llm", budget=budgets.Count(3)), "budget")
  refused(Slots(cache=dataclasses.replace(trim, store=Kivi(2, 4, 8))),
          "stores tokens in groups")  # fmt: skip
  refused(Slots(cache=dataclasses.replace(trim, read=Pages(ALL))),
          "indexes entries by their place")  # fmt: skip
  shared = SharedPages(ALL, layers=(0,))
  refused(Slots(cache=dataclasses.replace(snap, read=shared)), "same places")
  refused(Slots(cache=KV(trim=Trim())), "needs evict=")
  refused(Slots(cache=KV(store=Kivi(2, 32, 128))), "no multiple of the group")
  act, linear = recipes.get("act").attend, recipes.get("lightning_attention")
  refused(Slots(attend=act, cache=KV(store=Kivi(2, 4, 8))), "leaves notes")
  refused(
    Slots(attend=act, cache=recipes.get("razor_attention").cache),
    "tells heads apart",
  )
  refused(Slots(cache=linear.cache), "use attend=Linear")
  refused(
    Slots(attend=act, cache=recipes.get("lococo").cache), "use attend=None"
  )
  refused(Slots(attend=act, cache=recipes.get("infllm").cache), "use KV")
  refused(
    Slots(attend=recipes.get("infllm").attend, cache=KV()), r"use Retriever\(\)"
  )
  refused(Slots(cache=recipes.get("pod").cache), "use KV")
  refused(
    Slots(attend=recipes.get("pod", leaders=((0,), (0,))).attend), "key heads"
  )
  refused(
    Slots(attend=recipes.get("zerotuning", heads=(9,)).attend), "query heads"
  )
  refused(Slots(cache=ByLayer((((7,), KV()),), KV())), "there are 2")
  refused(Slots(cache=ByHead((((5,), KV()),))), "key heads .5.")


def test_a_whole_prompt_is_asked_for():
  c = case("xattention")
  layer, a = cases.layers()[0], cases.TEXT.prompt(0, 0, 16)
  state = c.cache.init(layer, len(LENGTHS), cases.PROMPT, 1)
  with pytest.raises(ValueError, match="a chunk of 16 of 32 tokens"):
    jax.eval_shape(
      lambda a: c.cache.prefill(
        layer, state, a, attend=c.attend, params={}, carry={}, last=True
      )[0],
      a,
    )
  with pytest.raises(ValueError, match="a chunk of 16 tokens.*prompt=16"):
    jax.eval_shape(
      lambda a: c.cache.prefill(
        layer, c.cache.init(layer, len(LENGTHS), 8, 1), a, attend=c.attend,
        params={}, carry={}, last=True,
      )[0],
      a,
    )  # fmt: skip
  with pytest.raises(ValueError, match="prompt=0"):
    KV().init(layer, 1, 0, 4)
