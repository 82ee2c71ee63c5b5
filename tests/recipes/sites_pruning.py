"""Tokens and signals for the tests of pruning and baselines, without a model.

A chain of stages stands for a model: between them, signals are made from the
tokens themselves, so that a token that leaks anywhere changes what follows.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tests.recipes.answering import answers_of
from tokjax import recipes
from tokjax.attention import dense
from tokjax.plan import move_batch
from tokjax.reduce.stage import Stage
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens

WIDTH, HEADS = 12, 3


def rows(seed: int, *shape: int) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape).astype(np.float32)


def tokens_of(x, mask=None) -> Tokens:
  """A batch `[b, 1 + n, d]` whose first token is the class token."""
  b, n, _ = x.shape
  side = int(np.ceil(np.sqrt(n - 1)))
  place = np.stack(np.divmod(np.arange(n - 1), side), -1)
  place = np.concatenate([np.zeros((1, 2)), place]).astype(np.float32)
  kind = np.array([Kind.CLASS] + [Kind.PATCH] * (n - 1), np.int32)
  return Tokens(
    jnp.asarray(x),
    jnp.ones((b, n)),
    jnp.broadcast_to(jnp.asarray(place), (b, n, 2)),
    jnp.broadcast_to(jnp.asarray(kind), (b, n)),
    None if mask is None else jnp.asarray(mask),
  )


def signals_of(tokens: Tokens) -> dict[str, jax.Array]:
  """What attention over the tokens would give, keys being the tokens."""
  b, n, d = tokens.x.shape
  keys = tokens.x.reshape(b, n, HEADS, d // HEADS).transpose(0, 2, 1, 3)
  logits = jnp.einsum("bhqk,bhnk->bhqn", keys, keys[..., ::-1])
  if tokens.mask is not None:
    logits = jnp.where(tokens.mask[:, None, None, :], logits, -jnp.inf)
  attention = jax.nn.softmax(logits, axis=-1)
  return dict(
    keys=keys,
    values=jnp.sin(keys),
    attention=attention,
    class_attention=attention[:, :, 0],
    received_attention=dense.received(attention, tokens.mask),
  )


def stage_of(name: str, n: int, layer: int, *, depth: int = 4, **options):
  """The stage of a recipe at a block, for n patches."""
  (reduce,) = recipes.get(name, **options).reduce
  after = reduce.budget.counts(n, depth)[layer]
  return Stage(reduce, after, layer, depth, 1, n)


def chain(slots: Slots, tokens: Tokens, keys=None, depth: int = 4) -> Tokens:
  """The tokens after all stages of a recipe with one reduction."""
  (reduce,) = slots.reduce
  n = tokens.num_tokens - 1
  real = left = None
  if tokens.mask is not None:
    real = left = tokens.mask[:, 1:].sum(axis=1)
  arriving = n
  for layer, after in enumerate(slots.counts(n, depth)[0]):
    if after is not None:
      stage = Stage(reduce, after, layer, depth, 1, n, arriving=arriving)
      due = None if real is None else stage.due(real, left)
      answers = answers_of(reduce, layer, depth, **signals_of(tokens))
      plan, _ = stage.plan(tokens, answers, due=due, keys=keys)
      tokens = move_batch(plan, tokens)
      left = None if due is None else due.left
      arriving = after
  return tokens
