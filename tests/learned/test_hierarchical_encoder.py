"""SMITH: vectors of blocks and documents, and what they are trained by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.cases import QUICK
from tokjax.models import hierarchical_encoder as hierarchical
from tokjax.models.hierarchical_encoder import (
  HierarchicalConfig,
  HierarchicalEncoder,
)

CONFIG = HierarchicalConfig(
  vocabulary=11, width=8, heads=2, mlp_dim=12, block=4, blocks=4, depth=1,
  depth_above=1,
)  # fmt: skip
MODEL = HierarchicalEncoder(CONFIG)
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, 11, (2, 3, 4)), jnp.int32)
# The second document ends in its second block.
WORDS = np.array([[4, 4, 3], [4, 2, 0]])
VALID = jnp.asarray(np.arange(4)[None, None] < WORDS[..., None])
KEY = jax.random.key(3)


def everything(ids, valid):
  """What the model makes of documents, so that there is one program."""

  def of(model):
    vectors, real, _ = model.blocks_of(ids, valid)
    return {
      "document": model(ids, valid),
      "blocks": vectors,
      "real": real,
      "words": model.word_loss(ids, valid, ids, valid & (ids > 6)),
      "told": model.block_loss(ids, valid, KEY),
    }

  return of


@pytest.fixture(scope="module")
def params():
  init = lambda key: MODEL.init(
    key, method=lambda model: everything(IDS, VALID)(model)
  )["params"]
  draw = lambda x: jnp.asarray(RNG.normal(size=x.shape) * 0.5, jnp.float32)
  return jax.tree.map(draw, jax.eval_shape(init, jax.random.key(0)))


@pytest.fixture(scope="module")
def run(params):
  program = jax.jit(
    lambda ids, valid: MODEL.apply(
      {"params": params}, method=lambda model: everything(ids, valid)(model)
    ),
    compiler_options=QUICK,
  )
  return lambda ids, valid: jax.device_get(program(ids, valid))


def tower(p, x):
  """One sequence without padding, plain."""
  dense = lambda q, x: x @ np.asarray(q["kernel"]) + np.asarray(q["bias"])

  def norm(q, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-12)
    return x * np.asarray(q["scale"]) + np.asarray(q["bias"])

  x = norm(p["norm"], x + np.asarray(p["position"])[: len(x)])
  b, d = p["block_0"], CONFIG.width // CONFIG.heads
  q, k, v = (dense(b[name], x) for name in ("query", "key", "value"))
  y = np.zeros_like(x)
  for h in range(CONFIG.heads):
    part = slice(h * d, (h + 1) * d)
    for i in range(len(x)):
      w = np.exp(k[:, part] @ q[i, part] / np.sqrt(d))
      y[i, part] = w / w.sum() @ v[:, part]
  x = norm(b["norm1"], x + dense(b["out"], y))
  z = dense(b["fc1"], x)
  z = z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
  x = norm(b["norm2"], x + dense(b["fc2"], z))
  y = np.maximum(dense(p["project"], np.tanh(dense(p["pool"], x[0]))), 0)
  return y / np.sqrt(max((y * y).sum(), 1e-12)), x


def test_padded_documents_equal_the_reference_one_by_one(params, run):
  got = run(IDS, VALID)
  table = np.asarray(params["embed"]["embedding"])
  for b, words in enumerate(WORDS):
    blocks = [
      tower(params["words"], table[IDS[b, m, :n]])[0]
      for m, n in enumerate(words)
      if n
    ]
    np.testing.assert_allclose(
      got["blocks"][b, : len(blocks)], blocks, rtol=1e-3, atol=1e-4
    )
    want = tower(params["above"], np.stack(blocks))[0]
    np.testing.assert_allclose(got["document"][b], want, rtol=1e-3, atol=1e-4)
  assert got["real"].tolist() == [[True] * 3, [True, True, False]]
  length = np.linalg.norm(got["blocks"][got["real"]], axis=-1)
  np.testing.assert_allclose(length, 1, rtol=1e-5)


def test_a_block_is_read_alone_and_padding_is_not(run):
  before = run(IDS, VALID)
  other = run(jnp.where(VALID, IDS, 9), VALID)
  for name, x in before.items():
    np.testing.assert_array_equal(x, other[name])
  after = run(IDS.at[0, 1].set((IDS[0, 1] + 1) % 11), VALID)
  same = (before["blocks"] == after["blocks"]).all(axis=-1)
  assert same.tolist() == [[True, False, True], [True] * 3]
  assert np.any(before["document"][0] != after["document"][0])


def test_masked_blocks_are_told_from_each_other(params, run):
  got = run(IDS, VALID)
  draw = np.asarray(jax.random.uniform(KEY, (2, 3)))
  first = lambda b: sorted(range(3 - b), key=lambda m: draw[b, m])[:2]
  chosen = [(b, m) for b in range(2) for m in first(b)]
  table = np.stack([got["blocks"][at] for at in chosen])
  guesses = []
  for b, m in chosen:
    rows = got["blocks"][b][got["real"][b]].copy()
    rows[[j for a, j in chosen if a == b]] = np.asarray(params["hidden"])
    state = tower(params["above"], rows)[1][m]
    y = state @ np.asarray(params["block_dense"]["kernel"])
    y = jax.nn.gelu(y + np.asarray(params["block_dense"]["bias"]))
    y = np.asarray(y - y.mean()) / np.asarray(jnp.std(y))
    scale, bias = (params["block_norm"][name] for name in ("scale", "bias"))
    guesses.append(y * np.asarray(scale) + np.asarray(bias))
  logits = np.stack(guesses) @ table.T
  want = np.log(np.exp(logits).sum(axis=1)) - np.diagonal(logits)
  np.testing.assert_allclose(got["told"], want.mean(), rtol=1e-3)
  assert got["words"] > 0


def test_pairs_match_by_the_product_of_their_vectors():
  """The card: the logit is 6 times the cosine."""
  one, other = jnp.asarray([[1.0, 0], [1, 0]]), jnp.asarray([[1.0, 0], [0, 1]])
  match = jnp.asarray([True, False])
  got = hierarchical.matching_loss(one, other, match, positive=3.0)
  want = (3 * np.log1p(np.exp(-6)) + np.log(2)) / 2
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_bad_input_is_refused(params):
  with pytest.raises(ValueError, match="depth=0: must be 1 or more"):
    HierarchicalConfig(vocabulary=9, depth=0)
  with pytest.raises(ValueError, match="heads=3: must divide width=256"):
    HierarchicalConfig(vocabulary=9, heads=3)
  wide = jnp.zeros((1, 5, 4), jnp.int32)
  with pytest.raises(ValueError, match="5 blocks of 4 words; there are places"):
    MODEL.apply({"params": params}, wide, wide == 0)
  with pytest.raises(ValueError, match="masked=1: must be 2 or more"):
    MODEL.apply(
      {"params": params}, IDS, VALID, KEY, 1, method=MODEL.block_loss
    )
