"""Prompts and masks small enough to be checked by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.cache.cases import QUICK
from tokjax import budgets
from tokjax.cache import entries as entries_lib
from tokjax.cache import workspace
from tokjax.cache.answers import Observed
from tokjax.cache.entries import Entries
from tokjax.cache.evict import evict, evicting
from tokjax.cache.prompt import Prompt
from tokjax.layer import Arrivals, Layer, Memory
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_top

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


def evicted(reduce: Reduce, k, v) -> Entries:
  """What a reduction leaves of one head's keys and values, `[n, D]`."""
  n, width = k.shape
  layer = Layer(head_dim=width)
  x = lambda x: jnp.asarray(x, jnp.float32)[None, :, None]

  def run(q, k, v):
    at, real = jnp.arange(n)[None], jnp.ones((1, n), bool)
    space = workspace.start(layer, 1, n, 0)
    space = workspace.add(space, Arrivals(q, k, v, at, real))
    whole = entries_lib.of_memory(layer, space.memory, rotated=False)
    return evict(reduce, layer, space, whole)

  few = quick(run, x(np.zeros((n, width))), x(k), x(v))
  return jax.tree.map(lambda x: x[0, 0], few)


def keep(score, count, **ends):
  """Positions that stay of the entries of one head with these scores."""
  n = len(score)
  given = Observed(fn=lambda prompt: jnp.asarray(score, jnp.float32)[None])
  reduce = evicting(keep_top(given), budgets.Count(count), **ends)
  few = evicted(reduce, np.zeros((n, 2)), np.zeros((n, 2)))
  return few.position[: few.length].tolist()
