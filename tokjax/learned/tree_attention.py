"""Tree Cross Attention: a query reads O(log n) of n tokens (2024).

Tokens, in an order in which neighbours belong together, are the leaves of a
tree. A node is what one encoder layer makes of its children, averaged. A query
starts at the root and, at each level, goes on to one child; its other children
stand for all that is below them. What was passed by and the last group of
leaves are then attended to as by any cross attention, with the same weights
that chose the way. The choice is trained by reinforcement: `policy_loss`.

Feng et al., 2024; checked against BorealisAI/tree-cross-attention:
models/memory_modules.py, attention_modules.py, aggregator_modules.py
(3c4a9c0), run next to this on the same arrays. Deviations: levels are counted
in integers (there by a quotient of logarithms), 2 to `branch` tokens are one
group of leaves (the official search then passes by the leaf that it chose), and
examples of a batch may have different lengths, each with its own tree.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


class Read(NamedTuple):
  """What queries found.

  Attributes:
    out: what they read along their way, `[b, q, d]`.
    full: the same attention to all tokens, for training, `[b, q, d]`.
    log_prob: of the way, a sum over levels, `[b, q]`.
    entropy: of the choice, a mean over levels and heads, in nats, `[b, q]`.
    read: nodes and tokens attended to for `out`, `[b, q]`.
    group: the group of leaves that the way ended at, `[b, q]`.
  """

  out: Float[Array, "b q d"]
  full: Float[Array, "b q d"]
  log_prob: Float[Array, "b q"]
  entropy: Float[Array, "b q"]
  read: Int[Array, "b q"]
  group: Int[Array, "b q"]


class Level(NamedTuple):
  """Nodes of one depth, by parent, of one example.

  Attributes:
    x: `[parents, children, d]`.
    real: has real tokens below it, `[parents, children]`.
    own: stands in the tree of this example, padding of that tree included.
  """

  x: Float[Array, "p c d"]
  real: Bool[Array, "p c"]
  own: Bool[Array, "p c"]


def shape(tokens: int, branch: int) -> tuple[int, int]:
  """Levels of choices, and leaves in each of the `branch ** levels` groups.

  The most levels whose groups have two tokens or more on average.
  """
  levels = 0
  while branch ** (levels + 1) < tokens:
    levels += 1
  return levels, max(1, -(-tokens // branch**levels))


class Attention(nn.Module):
  """Heads of scaled dot products; keys and values are not normalised.

  Attributes:
    heads: number of heads, which divides the width.
  """

  heads: int

  @nn.compact
  def __call__(
    self,
    query: Float[Array, "*b q d"],
    x: Float[Array, "*b n d"],
    seen: Bool[Array, "*#b #q n"],
  ) -> tuple[Float[Array, "*b q d"], Float[Array, "*b h q n"]]:
    """Outputs and weights; zeros for a query that sees nothing."""
    width = query.shape[-1]
    split = lambda name, x: nn.DenseGeneral(
      (self.heads, width // self.heads), use_bias=False, name=name
    )(x)
    q, k, v = split("query", query), split("key", x), split("value", x)
    logit = jnp.einsum("...qhd,...nhd->...hqn", q, k) * q.shape[-1] ** -0.5
    weight = jax.nn.softmax(logit, axis=-1, where=seen[..., None, :, :])
    out = jnp.einsum("...hqn,...nhd->...qhd", weight, v)
    return nn.DenseGeneral(width, axis=(-2, -1), name="out")(out), weight


class FeedForward(nn.Module):
  """A gated MLP on the normed input, which is also its residual.

  Attributes:
    hidden: units behind the gate.
  """

  hidden: int

  @nn.compact
  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    x = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
    up, gate = jnp.split(nn.Dense(2 * self.hidden, name="fc1")(x), 2, axis=-1)
    up = up * jax.nn.gelu(gate, approximate=False)
    return x + nn.Dense(x.shape[-1], name="fc2")(up)


class Node(nn.Module):
  """The mean of what one encoder layer makes of real children.

  Attributes:
    heads, hidden: as for `TreeCrossAttention`.
  """

  heads: int
  hidden: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "*b c d"], real: Bool[Array, "*b c"]
  ) -> Float[Array, "*b d"]:
    """Zeros where no child is real."""
    normed = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
    attention = Attention(self.heads, name="attention")
    y = normed + attention(normed, x, real[..., None, :])[0]
    y = FeedForward(self.hidden, name="mlp")(y)
    total = jnp.where(real[..., None], y, 0.0).sum(axis=-2)
    return total / jnp.maximum(real.sum(axis=-1), 1)[..., None]


class TreeCrossAttention(nn.Module):
  """See the module.

  Attributes:
    heads: of all attention, which divide the width.
    hidden: units of the MLPs.
    branch: children of a node.
    through: gradients go through the tree down to the tokens; otherwise nodes
      are made of constants, and tokens learn by being read alone.
    strict: a child that was passed by and has no token below it is not read.
      The official code reads it as a vector of zeros.
  """

  heads: int = 4
  hidden: int = 128
  branch: int = 2
  through: bool = False
  strict: bool = False

  def __post_init__(self):
    for name, least in (("heads", 1), ("hidden", 1), ("branch", 2)):
      if getattr(self, name) < least:
        raise ValueError(
          f"{name}={getattr(self, name)}: must be {least} or more"
        )
    super().__post_init__()

  def setup(self):
    self.node = Node(self.heads, self.hidden)
    self.norm = nn.LayerNorm(epsilon=1e-5)
    self.attention = Attention(self.heads)
    self.mlp = FeedForward(self.hidden)

  def __call__(
    self,
    query: Float[Array, "b q e"],
    tokens: Float[Array, "b n d"],
    mask: Bool[Array, "b n"],
    *,
    key: PRNGKeyArray | None = None,
  ) -> Read:
    """Reads `tokens` for every query.

    Args:
      query: what is looked for.
      tokens: in an order in which neighbours belong together, padding last.
      mask: real tokens, one or more.
      key: children are drawn by their probability, as in training; None: the
        most probable one.

    Raises:
      ValueError: widths differ, or heads do not divide them.
    """
    width = tokens.shape[-1]
    if query.shape[-1] != width:
      raise ValueError(
        f"query of width {query.shape[-1]}: must be that of tokens, {width}"
      )
    if width % self.heads:
      raise ValueError(f"heads={self.heads}: must divide the width {width}")
    tokens = jnp.where(mask[..., None], tokens, 0.0)
    levels = self._tree(tokens, mask)
    full = self._attended(query, tokens, mask[:, None])
    return self._search(query, levels, key)._replace(full=full)

  def _attended(self, query, x, seen):
    """Cross attention with its MLP; `x [*b, n, d]`, `seen [*b, #q, n]`."""
    normed = self.norm(query)
    y = normed + self.attention(normed, x, seen)[0]
    return self.mlp(y + query)

  def _tree(self, tokens, mask) -> list[Level]:
    """Levels from the root's children to the leaves, each of a batch."""
    n = tokens.shape[1]
    shapes = np.array([shape(i, self.branch) for i in range(n + 1)])
    depth, most = shapes.max(axis=0)
    deep, wide = jnp.asarray(shapes)[mask.sum(axis=1)].T

    def leaves(x, length, deep, wide):
      # An example with fewer levels takes the first groups of the deepest tree,
      # above which nodes have one child only and nothing is chosen.
      group = jnp.arange(self.branch**depth)[:, None]
      slot = jnp.arange(most)[None]
      own = (group < self.branch**deep) & (slot < wide)
      index = group * wide + slot
      real = own & (index < length)
      x = x[jnp.minimum(index, n - 1)]
      return Level(jnp.where(real[..., None], x, 0.0), real, own)

    levels = [jax.vmap(leaves)(tokens, mask.sum(axis=1), deep, wide)]
    while levels[0].x.shape[1] > 1:
      below = levels[0]
      x = below.x if self.through else jax.lax.stop_gradient(below.x)
      x = self.node(x, below.real)
      by_parent = lambda y: y.reshape(len(y), -1, self.branch, *y.shape[2:])
      above = (x, below.real.any(axis=-1), below.own.any(axis=-1))
      levels.insert(0, Level(*map(by_parent, above)))
    return levels

  def _search(self, query, levels, key) -> Read:
    """Without `full`, for which `out` stands in."""
    b, q, _ = query.shape
    at = jnp.zeros((b, q), jnp.int32)
    log_prob = entropy = choices = jnp.zeros((b, q))
    nodes, seen = [], []
    normed = self.norm(query)
    children = lambda level, at: jax.vmap(
      lambda level, at: jax.tree.map(lambda x: x[at], level)
    )(level, at)
    for number, level in enumerate(levels[:-1]):
      x, real, own = children(level, at)
      _, weight = self.attention(normed[:, :, None], x, real[:, :, None])
      weight = weight[:, :, :, 0]
      p = weight.mean(axis=2)
      chosen = _choose(p, real, key, number)
      picked = jax.nn.one_hot(chosen, p.shape[-1], dtype=bool)
      taken = jnp.where(picked, p, 0.0).sum(axis=-1)
      log_prob += jnp.log(jnp.maximum(taken, 1e-30))
      spread = -(weight * jnp.log(weight + 1e-9)).sum(axis=-1).mean(axis=2)
      # Above the root of a smaller tree there is no choice.
      choice = own.sum(axis=-1) > 1
      entropy += jnp.where(choice, spread, 0.0)
      choices += choice
      nodes.append(x)
      seen.append((real if self.strict else own) & ~picked)
      at = at * self.branch + chosen
    x, real, _ = children(levels[-1], at)
    x = jnp.concatenate([*nodes, x], axis=2)
    seen = jnp.concatenate([*seen, real], axis=2)
    out = self._attended(query[:, :, None], x, seen[:, :, None])[:, :, 0]
    entropy = entropy / jnp.maximum(choices, 1)
    return Read(out, out, log_prob, entropy, seen.sum(axis=-1), at)


def _choose(p, real, key, level: int):
  """Children by probabilities `[b, q, c]`: drawn, or the most probable."""
  p = jnp.where(real, p, -1.0)
  if key is None:
    return jnp.argmax(p, axis=-1).astype(jnp.int32)
  logit = jnp.where(real, jnp.log(jnp.maximum(p, 1e-30)), -jnp.inf)
  key = jax.random.fold_in(key, level)
  return jax.random.categorical(key, logit).astype(jnp.int32)


def policy_loss(
  read: Read,
  reward: Float[Array, "b q"],
  *,
  baseline: float = 0.0,
  bonus: float = 0.01,
) -> Float[Array, ""]:
  """REINFORCE with an entropy bonus, a mean over queries.

  Added to the task's losses on `read.out` and on `read.full`, all three with
  weight 1.

  Args:
    read: with ways that were drawn.
    reward: how good the answers of `read.out` are: whether one is right, minus
      a cross entropy, a log-likelihood; no gradient goes through it.
    baseline: taken off rewards: 0, or minus the log of the number of classes
      for minus a cross entropy.
    bonus: factor on the entropy.
  """
  gain = jax.lax.stop_gradient(reward) - baseline
  return -(read.log_prob * gain).mean() - bonus * read.entropy.mean()
