"""AOC: an encoder without MLPs tells a model of a prompt by memory alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.cases import QUICK
from tests.decoder.models import config
from tokjax.models import prompt_compression
from tokjax.models.prompt_compression import PromptCompressor, Repetition

CONFIG = config(tied=False)
M, N, LENGTHS = 3, 6, np.array([6, 4])
MODEL = PromptCompressor(CONFIG, M)
IDS = np.random.default_rng(0).integers(0, CONFIG.vocabulary, (2, N))
PROMPT = jnp.asarray(IDS, jnp.int32)


@pytest.fixture(scope="module")
def params():
  shapes = jax.eval_shape(
    MODEL.init, jax.random.key(0), PROMPT, jnp.asarray(LENGTHS), PROMPT
  )["params"]
  rng = np.random.default_rng(1)
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, jnp.float32)
  return jax.tree.map(draw, shapes)


@pytest.fixture(scope="module")
def run():
  return jax.jit(
    lambda params, *a: MODEL.apply({"params": params}, *a),
    compiler_options=QUICK,
  )


def normed(x, p):
  x = x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.epsilon)
  return x * np.asarray(p["scale"])


def turned(x, position):
  """One head's vectors, by the angles of the model."""
  rotate = CONFIG.rotary_of(0)
  x = rotate(jnp.asarray(x)[:, None], jnp.asarray(position))
  return np.asarray(x)[:, 0]


def mixed(p, x, position, before=None):
  """Attention of one block: outputs, and keys and values of each head."""
  dense = lambda name, x: x @ np.asarray(p[name]["kernel"]) + (
    np.asarray(p[name]["bias"]) if "bias" in p[name] else 0
  )
  d, out, kept = CONFIG.features, [], []
  q, k, v = (dense(name, x) for name in ("query", "key", "value"))
  for h in range(CONFIG.heads):
    g = h // (CONFIG.heads // CONFIG.kv_heads)
    part = lambda y, i: y[:, i * d : (i + 1) * d]
    queries, keys = turned(part(q, h), position), turned(part(k, g), position)
    values = part(v, g)
    first = 0
    if before is not None:
      keys = np.concatenate([before[g][0], keys])
      values = np.concatenate([before[g][1], values])
      first = len(before[g][0])
    rows = []
    for i in range(len(x)):
      z = keys[: first + i + 1] @ queries[i] * d**-0.5
      w = np.exp(z - z.max())
      rows.append(w / w.sum() @ values[: first + i + 1])
    out.append(np.stack(rows))
    kept.append((g, keys, values))
  return dense("out", np.concatenate(out, axis=1)), kept


def slow(params, ids, text):
  """One prompt without padding, one block after the other."""
  table = np.asarray(params["decoder"]["embed"]["embedding"])
  x = np.concatenate([table[ids], np.asarray(params["memory"])])
  memories = []
  for i in range(CONFIG.depth):
    p = params[f"encoder_{i}"]
    y, kept = mixed(p["attention"], normed(x, p["norm1"]), np.arange(len(x)))
    x = x + y
    x = x + normed(x, p["norm2"])
    memories.append({g: (k[-M:], v[-M:]) for g, k, v in kept})
  x = table[text]
  for i, before in enumerate(memories):
    p = params["decoder"][f"block_{i}"]
    at = M + np.arange(len(x))
    x = x + mixed(p["attention"], normed(x, p["norm1"]), at, before)[0]
    y, mlp = normed(x, p["norm2"]), p["mlp"]
    gate, up = (y @ np.asarray(mlp[name]["kernel"]) for name in ("gate", "up"))
    y = gate / (1 + np.exp(-gate)) * up
    x = x + y @ np.asarray(mlp["down"]["kernel"])
  x = normed(x, params["decoder"]["norm"])
  return x @ np.asarray(params["decoder"]["head"]["kernel"])


def test_ragged_prompts_equal_the_reference_one_by_one(params, run):
  got = run(params, PROMPT, jnp.asarray(LENGTHS), PROMPT)
  for b, n in enumerate(LENGTHS):
    want = slow(params, IDS[b, :n], IDS[b])
    np.testing.assert_allclose(got[b], want, rtol=2e-3, atol=2e-3)


def test_it_starts_from_a_language_model(params):
  made = prompt_compression.from_decoder(params, params["decoder"])
  assert jax.tree.structure(made) == jax.tree.structure(params)
  block, copy = made["decoder"]["block_1"], made["encoder_1"]
  assert copy["attention"] is block["attention"]
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert count(copy) == count(block) - count(block["mlp"])


def test_a_repetition_asks_for_the_prompt_and_its_end():
  class Known:
    def apply(self, variables, prompt, length, text):
      assert text[:, 0].tolist() == [1, 1]
      # The right next token of the first prompt, always 2 for the second.
      said = jnp.where(jnp.arange(2)[:, None] == 0, right, 2)
      return 50.0 * jax.nn.one_hot(said, 9)

  prompt, length = jnp.asarray([[5, 6, 7], [2, 8, 8]]), jnp.asarray([2, 1])
  right = jnp.asarray([[5, 6, 3, 0]])
  loss, hit = Repetition(begin=1, end=3)(Known(), {}, prompt, length)
  np.testing.assert_allclose(hit, 4 / 5)
  np.testing.assert_allclose(loss, 50 / 5, rtol=1e-4)


def test_models_it_cannot_read_are_refused():
  with pytest.raises(ValueError, match="memory=0: must be 1 or more"):
    PromptCompressor(CONFIG, 0)
  sliding = config(layers=("sliding",), window=4)
  with pytest.raises(ValueError, match="sliding layers"):
    PromptCompressor(sliding)
