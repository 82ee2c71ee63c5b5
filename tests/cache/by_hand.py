"""Prompts and masks small enough to be checked by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.cache.cases import QUICK
from tokjax.cache.evict import Prompt, chosen
from tokjax.layer import Arrivals, Layer, Memory

LAYER = Layer(head_dim=4, scale=1.0)
ROWS = np.array(
  [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.1, 0.1, 0.3, 0.5]]
)


def quick(function, *arguments):
  """One small compilation instead of one for every operation."""
  return jax.jit(function, compiler_options=QUICK)(*arguments)


def prompt_of(rows, layer=LAYER) -> Prompt:
  """A prompt whose one head attends as the rows say."""
  n = len(rows)
  q = np.log(np.maximum(rows, 1e-30)).astype(np.float32)[:, None]
  k = np.eye(n, dtype=np.float32)[:, None]
  at, real = jnp.arange(n), jnp.ones(n, bool)
  q, k = jnp.asarray(q), jnp.asarray(k)
  return Prompt(layer, q, at, real, k, k, at, real, None)


def arrivals(n, token=None, width=4, heads=1) -> Arrivals:
  x = np.random.default_rng(0).normal(size=(3, 1, n, heads, width))
  q, k, v = jnp.asarray(x, jnp.float32)
  at = jnp.arange(n)[None]
  token = None if token is None else jnp.asarray([token])
  return Arrivals(q, k, v, at, jnp.ones((1, n), bool), token)


def pairs(attend, n, token=None, layer=LAYER) -> np.ndarray:
  a = arrivals(n, token)
  see = lambda a: attend.seen(layer, a, Memory.of(a))(jnp.arange(n))
  return np.asarray(quick(see, a))[0, 0]


def keep(score, count, **ends):
  score = jnp.asarray(score, jnp.float32)
  pick = quick(
    lambda score: chosen(
      score, jnp.int32(len(score)), room=len(score), count=count, **ends
    ),
    score,
  )
  return np.asarray(pick.index)[np.asarray(pick.valid)].tolist()
