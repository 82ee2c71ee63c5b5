"""Whole blocks in NumPy: where reductions act, and what attention sees."""

import functools
import math

import jax
import numpy as np
import pytest

from tests.recipes import reference_merging as reference
from tests.recipes.sites_merging import batch_of
from tests.recipes.sites_pruning import rows
from tokjax import budgets, recipes
from tokjax.models import ViTConfig
from tokjax.models.encoder import Encoder

B, WIDTH, HEADS, DEPTH, EPSILON = 2, 12, 3, 2, 1e-6
ERF = np.vectorize(math.erf)


def dense(x, p):
  return x @ p["kernel"] + p["bias"]


def norm(x, p):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)
  return x * p["scale"] + p["bias"]


def split(x):
  return x.reshape(len(x), HEADS, -1).transpose(1, 0, 2)


def output(weight, v, p):
  y = (weight @ v).transpose(1, 0, 2).reshape(weight.shape[1], WIDTH)
  return dense(y, p["attention"]["out"])


def attend(x, p, size):
  """Keys, values and the map of proportional attention, per head."""
  q, k, v = (
    split(dense(x, p["attention"][n])) for n in ("query", "key", "value")
  )
  logits = q @ k.transpose(0, 2, 1) / math.sqrt(WIDTH // HEADS) + np.log(size)
  weight = np.exp(logits - logits.max(-1, keepdims=True))
  return k, v, weight / weight.sum(-1, keepdims=True)


def mlp(x, p):
  y = dense(norm(x, p["norm2"]), p["mlp"]["fc1"])
  y = y * (1 + ERF(y / math.sqrt(2))) / 2
  return x + dense(y, p["mlp"]["fc2"])


def tome(x, size, p, protected):
  k, v, weight = attend(norm(x, p["norm1"]), p, size)
  x = x + output(weight, v, p)
  groups = reference.tome(k.mean(0), 3, protected)
  return mlp(reference.mean(groups, x, size), p), reference.total(groups, size)


def mctf(x, size, p, protected):
  _, _, weight = attend(norm(x, p["norm1"]), p, size)
  mass = weight.mean((0, 1))
  edges = reference.mctf_weights(x, mass, size, (1, 20, 40))
  groups = reference.mctf(edges, 3, protected)
  x = reference.mean(groups, x, mass * size)
  v = split(dense(norm(x, p["norm1"]), p["attention"]["value"]))
  merged = [reference.merged_map(a, groups, mass * size) for a in weight]
  x = x + output(np.stack(merged), v, p)
  return mlp(x, p), reference.total(groups, size)


def tomesd(x, size, p, protected):
  assert protected == 0
  groups = reference.tomesd(x, [0, 2, 8, 10], 8)
  few = reference.mean(groups, norm(x, p["norm1"]), size)
  _, v, weight = attend(few, p, np.ones(len(few)))
  x = x + reference.restore(groups, output(weight, v, p))
  return mlp(x, p), size


CASES = {
  "tome": (tome, 2, {"budget": budgets.Constant(3)}),
  "mctf": (mctf, 1, {"budget": budgets.Constant(3)}),
  "tomesd": (tomesd, 0, {"random": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_encoder(name):
  block, protected, options = CASES[name]
  n = 16 + protected
  tokens = batch_of(rows(0, B, n, WIDTH), protected)
  config = ViTConfig(
    image_size=4, patch_size=1, width=WIDTH, depth=DEPTH, heads=HEADS,
    mlp_dim=20, epsilon=EPSILON, num_classes=None, pool="none",
    class_token=protected > 0, distillation_token=protected > 1,
  )  # fmt: skip
  encoder = Encoder(config, recipes.get(name, **options), np.float32)

  start = functools.partial(encoder.init, jax.random.key(0), grid=(4, 4))
  rng = np.random.default_rng(1)
  params = jax.tree.map(
    lambda a: rng.normal(0.2, 0.4, a.shape).astype(np.float32),
    jax.eval_shape(start, tokens),
  )
  run = jax.jit(lambda p, t: encoder.apply(p, t, grid=(4, 4))[0])
  out = run(params, tokens)
  for e in range(B):
    x, size = np.asarray(tokens.x[e], np.float64), np.ones(n)
    for i in range(DEPTH):
      x, size = block(x, size, params["params"][f"block_{i}"], protected)
    np.testing.assert_allclose(out.x[e], x, atol=2e-4, rtol=2e-4)
    np.testing.assert_array_equal(out.size[e], size)
