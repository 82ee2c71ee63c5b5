"""The block-sparse `attend` slot against dense attention over its choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import layout as layouts
from tests.decoder import models
from tokjax.attention import BlockSparse, Dense, core, estimators
from tokjax.attention.block_sparse import CausalBlockSparse
from tokjax.attention.causal import Causal
from tokjax.binding import bind
from tokjax.layer import Arrivals, Layer, Memory
from tokjax.models import ViT, ViTConfig
from tokjax.slots import Slots

B, H, N, D = 2, 2, 22, 8


def inputs():
  rng = np.random.default_rng(0)
  q, k, v = rng.normal(size=(3, B, H, N, D)).astype(np.float32)
  mask = np.ones((B, N), bool)
  mask[1, 17:] = False
  bias = rng.normal(size=(B, N)).astype(np.float32)
  return {"q": 2 * q, "k": k, "v": v, "bias": bias, "mask": mask}


def masked_softmax(q, k, v, bias, mask):
  """Attention over the pairs of `mask` `[b, h, n, n]`, float64."""
  q, k, v, bias = (np.asarray(x, np.float64) for x in (q, k, v, bias))
  logits = np.einsum("bhid,bhjd->bhij", q, k) / np.sqrt(D) + bias[:, None, None]
  weight = np.where(mask, np.exp(logits), 0)
  total = weight.sum(-1, keepdims=True)
  return np.einsum("bhij,bhjd->bhid", weight / np.where(total, total, 1), v)


RULES = (layouts.TopK(3), layouts.TopP(0.7, 4), layouts.Threshold(0.2, 3))


@pytest.fixture(scope="module")
def results():
  """One compilation: causal, with padding, a bias, the own block kept."""
  given = inputs()
  make = lambda rule: BlockSparse(
    rule=rule, block_q=8, block_k=4, pattern=layouts.Causal(),
    keep=layouts.Window(0),
  )  # fmt: skip

  @jax.jit
  def run(q, k, v, **where):
    found = [
      (attend(q, k, v, **where), attend.layout(q, k, **where).to_dense())
      for attend in map(make, RULES)
    ]
    loss = lambda bias: jnp.sum(
      make(RULES[0])(q, k, v, bias=bias, mask=where["mask"]) ** 2
    )
    whole = BlockSparse(rule=layouts.TopK(99), block_q=8, block_k=8)
    dense = whole(q, k, v, **where), Dense()(q, k, v, **where)
    return found, jax.grad(loss)(where["bias"]), dense

  found, *rest = run(**given)
  return given, dict(zip(RULES, found, strict=True)), *rest


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_it_attends_where_the_rule_says(rule, results):
  given, found, _, _ = results
  out, shown = found[rule]
  shown = np.asarray(shown) & given["mask"][:, None, None]
  causal = np.tril(np.ones((N, N), bool))
  assert not (shown & ~causal).any()
  own = np.eye(N, dtype=bool) & given["mask"][:, None, None]
  assert shown[np.broadcast_to(own, shown.shape)].all()
  expected = masked_softmax(*(given[n] for n in ("q", "k", "v", "bias")), shown)
  np.testing.assert_allclose(out, expected, atol=2e-5)
  blocks = np.pad(shown, ((0, 0), (0, 0), (0, 2), (0, 2)))
  blocks = blocks.reshape(B, H, 3, 8, 6, 4).any((3, 5))
  assert blocks.sum(-1).max() <= rule.capacity_of(6)


def test_hidden_keys_have_no_gradient(results):
  given, _, gradient, _ = results
  assert np.isfinite(gradient).all()
  assert np.asarray(gradient)[given["mask"]].any()
  assert not np.asarray(gradient)[~given["mask"]].any()


def test_every_block_chosen_is_dense_attention(results):
  sparse, dense = results[3]
  np.testing.assert_allclose(sparse, dense, atol=2e-5)


def test_it_fills_the_slot_of_a_vision_transformer():
  """One estimate per head and example, all blocks chosen."""
  config = ViTConfig(
    image_size=16, patch_size=4, width=16, depth=1, heads=2, mlp_dim=16,
    num_classes=3,
  )  # fmt: skip
  dense = Slots(proportional=True)
  sparse = BlockSparse(
    bind(estimators.antidiagonal, stride=2), layouts.TopK(99), 8, 8
  )
  images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  params = jax.jit(ViT(config, dense).init)(jax.random.key(1), images)

  @jax.jit
  def run(params):
    answers = [
      ViT(config, Slots(attend=attend, proportional=True)).apply(params, images)
      for attend in (None, sparse)
    ]
    return [out for out, _ in answers]

  whole, same = run(params)
  np.testing.assert_allclose(same, whole, atol=1e-5)


def test_wrong_arguments_are_named():
  with pytest.raises(ValueError, match="block_k=0: must be 1 or more"):
    BlockSparse(block_k=0)
  assert hash(BlockSparse()) == hash(BlockSparse())


def test_what_a_mask_hides_may_be_stored_anyhow():
  """Also for the choice of blocks, and backward."""
  given = inputs()
  attends = (BlockSparse(rule=layouts.TopK(2), block_q=8, block_k=4), Dense())

  @jax.jit
  def run(q, k, v, bias, mask):
    def loss(q, k, v):
      found = [attend(q, k, v, bias=bias, mask=mask) for attend in attends]
      found = [jnp.where(mask[:, None, :, None], x, 0) for x in found]
      return sum(jnp.sum(x**2) for x in found), found

    return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

  clean = run(**given)
  for name in ("k", "v"):
    hidden = ~given["mask"][:, None, :, None]
    given[name] = np.where(hidden, np.float32("nan"), given[name])
  for found, expected in zip(
    jax.tree.leaves(run(**given)[1]), jax.tree.leaves(clean[1]), strict=True
  ):
    np.testing.assert_array_equal(found, expected)
  for found in run(**given)[0]:
    assert np.isfinite(found).all()


@pytest.mark.parametrize("long", (1024, 16))
def test_it_fills_the_slot_of_a_decoder(long, monkeypatch):
  """By masks and by blocks; with all blocks chosen it is dense attention."""
  monkeypatch.setattr(core, "LONG", long)
  layer = Layer(heads=4, kv_heads=2, head_dim=8, scale=0.5, window=19)
  rng = np.random.default_rng(0)
  draw = lambda heads: jnp.asarray(rng.normal(size=(2, 30, heads, 8)), "f4")
  length = jnp.array([30, 21])[:, None]
  position = jnp.broadcast_to(jnp.arange(30), (2, 30))
  a = Arrivals(draw(4), draw(2), draw(2), position, position < length)

  def run(attend):
    out, _ = attend(layer, a, Memory.of(a), params={}, carry={})
    return np.where(a.valid[:, :, None, None], out, 0)

  every, few = (
    CausalBlockSparse(BlockSparse(rule=rule, block_q=8, block_k=4))
    for rule in (layouts.TopK(99), layouts.TopK(2))
  )
  np.testing.assert_allclose(run(every), run(Causal()), atol=2e-5)
  shown = few.layout(layer, a.clean(), Memory.of(a)).to_dense()
  assert np.asarray(shown).sum(-1).max() <= 8
  got = run(few)
  monkeypatch.setattr(core, "LONG", 1024)
  np.testing.assert_allclose(got, run(few), atol=2e-5)
  assert np.abs(got - run(Causal())).max() > 0.01


def test_a_decoder_is_built_with_it():
  attend = CausalBlockSparse(BlockSparse(block_q=8, block_k=8))
  model = models.decoder(Slots(attend=attend), depth=1)
  text = jnp.asarray(models.tokens(1, 12))
  params = models.params_of(model.config, model.slots)
  logits, _ = model.apply({"params": params}, text)
  assert np.isfinite(logits).all()
