"""One reduction of a batch, without a model, for merging and clustering."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.recipes.answering import answers_of
from tokjax import recipes
from tokjax.plan import Plan, move_batch
from tokjax.reduce.stage import Stage
from tokjax.tokens import Kind, Tokens

FRONT = (Kind.CLASS, Kind.DISTILLATION)


def batch_of(x, protected: int = 0, size=None) -> Tokens:
  """A batch `[b, n, d]` with so many protected tokens in front."""
  b, n, _ = x.shape
  kind = [*FRONT[:protected]] + [Kind.PATCH] * (n - protected)
  size = np.ones((b, n)) if size is None else size
  return Tokens(
    jnp.asarray(x, jnp.float32),
    jnp.asarray(size, jnp.float32),
    jnp.zeros((b, n, 2)),
    jnp.broadcast_to(jnp.array(kind, jnp.int32), (b, n)),
  )


def sizes(seed: int, *shape: int) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.integers(1, 6, shape).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Result:
  """What one reduction did.

  Attributes:
    plan: the batch's plans.
    tokens: what is left.
    matrix: the plans' matrices, `[b, m, n]`.
    restored: the reduced features given back, `[b, n, d]`.
  """

  plan: Plan
  tokens: Tokens
  matrix: np.ndarray
  restored: np.ndarray

  def groups(self, e: int) -> list[set[int]]:
    """The members of every output of one example."""
    return [set(np.flatnonzero(row).tolist()) for row in self.matrix[e]]


def reduce_once(
  name: str,
  tokens: Tokens,
  keep: int,
  *,
  layer: int = 0,
  depth: int = 12,
  grid: tuple[int, int] | None = None,
  key=None,
  options=None,
  **signals,
) -> Result:
  """Applies a recipe once, so that `keep` free tokens are left."""
  (reduce,) = recipes.get(name, **(options or {})).reduce
  protected = int(tokens.of_kind()[0].sum())
  free = tokens.num_tokens - protected
  stage = Stage(reduce, keep, layer, depth, protected, free, grid)
  keys = None if key is None else jax.random.split(key, len(tokens.x))

  @jax.jit
  def run(tokens, answers, keys):
    plan, _ = stage.plan(tokens, answers, keys=keys)
    out = move_batch(plan, tokens)
    restored = jax.vmap(lambda p, x: p.restore(x))(plan, out.x)
    return plan, out, jax.vmap(lambda p: p.matrix())(plan), restored

  answers = answers_of(reduce, layer, depth, **signals)
  plan, out, *rest = run(tokens, answers, keys)
  return Result(plan, out, *jax.device_get(rest))
