"""A memory of blocks that unusual queries search (ActQKV).

What is read and at which distances is that of `block_memory`. Checked against
benchmark/actqkv/attention/context_manager_activate_3.py (175c84b).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax.attention.block_memory import BlockMemory

# Windows that a running mean counts at most.
WINDOWS = 1000


class Usual(NamedTuple):
  """Queries of a layer so far: what a new one is compared with.

  Attributes:
    mean, variance: of each channel, `[c]`.
    windows: how many windows of queries they come from.
  """

  mean: Float[Array, "c"]
  variance: Float[Array, "c"]
  windows: Float[Array, ""]

  @classmethod
  def empty(cls, channels: int) -> "Usual":
    zeros = jnp.zeros((channels,), jnp.float32)
    return cls(zeros, zeros, jnp.zeros((), jnp.float32))

  def seen(self, q: Float[Array, "t c"], valid: Bool[Array, "t"]) -> "Usual":
    """With one window more; itself if nothing of it is valid.

    The variance is that of all windows pooled, as if each had as many queries
    as this one.
    """
    size = valid.sum().astype(jnp.float32)
    some = jnp.maximum(size, 1.0)
    mean = jnp.where(valid[:, None], q, 0.0).sum(axis=0) / some
    off = jnp.where(valid[:, None], q - mean[None], 0.0)
    variance = (off**2).sum(axis=0) / some
    n = jnp.minimum(self.windows, WINDOWS)
    between = (mean - self.mean) ** 2 * n / (n + 1.0)
    pooled = self.variance * jnp.maximum(n - 1.0 / some, 0.0)
    # A single query has no variance yet.
    pooled = (pooled + variance + between) / jnp.maximum(
      n + 1.0 - 1.0 / some, 1e-6
    )
    moved = (self.mean * n + mean) / (n + 1.0)
    new = Usual(moved, pooled, self.windows + 1.0)
    return jax.tree.map(lambda a, b: jnp.where(size > 0, a, b), new, self)

  def deviation(self, q: Float[Array, "t c"]) -> Float[Array, "t"]:
    """Mean squared deviation over channels, in units of their variances."""
    scale = self.variance + self.variance.mean() / 100
    scale = jnp.where(scale > 0, scale, 1.0)
    return ((q - self.mean[None]) ** 2 / scale[None]).mean(axis=-1)


def probe(
  usual: Usual, q: Float[Array, "t c"], valid: Bool[Array, "t"]
) -> Float[Array, "c"]:
  """The window's mean query, weighted by how unusual each query is.

  Queries that are all as usual as can be count alike.
  """
  weight = jnp.where(valid, usual.deviation(q), 0.0)
  total = weight.sum()
  alike = valid / jnp.maximum(valid.sum(), 1)
  weight = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), alike)
  return weight @ jnp.where(valid[:, None], q, 0.0)


def density(
  score: Float[Array, "m"], there: Bool[Array, "m"]
) -> Float[Array, ""]:
  """Entropy of the softmax of scores, as a share of the largest possible."""
  p = jax.nn.softmax(score, where=there)
  entropy = -jnp.sum(p * jnp.log(p + 1e-10), where=there)
  count = there.sum()
  return jnp.where(count > 1, entropy / jnp.log(jnp.maximum(count, 2)), 0.0)


def shares(
  count: Int[Array, ""],
  blocks: Int[Array, ""],
  densities: Sequence[float],
  least: int,
) -> list[Int[Array, ""]]:
  """Blocks that each layer reads: `count` in the mean, more where dense.

  From the first layer on, each takes its share of what is left, but no more
  than twice `count`, and at least `least` blocks where there are so many.

  Args:
    count: blocks that a layer reads in the mean.
    blocks: how many there are.
    densities: of every layer.
    least: see above.
  """
  left, found = count * len(densities), []
  for i, own in enumerate(densities):
    due = jnp.round(left * (own / sum(densities[i:]))).astype(jnp.int32)
    found.append(within(due, count, blocks, least))
    left = left - found[-1]
  return found


def within(
  due: Int[Array, ""], count: Int[Array, ""], blocks: Int[Array, ""], least: int
) -> Int[Array, ""]:
  """What a layer reads that `due` blocks are due to; see `shares`."""
  most = jnp.minimum(blocks, 2 * count)
  return jnp.maximum(jnp.minimum(due, most), jnp.minimum(blocks, least))


@dataclasses.dataclass(frozen=True)
class ProbeQuery(BlockMemory):
  """Blocks whose representatives point where unusual queries point (ActQKV).

  A window of queries is summed up by a probe in which a query weighs the more
  the farther it is from the mean of all queries so far. A block is as relevant
  as the cosine, over all heads together, of its representative and the probe.
  Decoding layers share the budget by the entropy of these scores.

  Attributes:
    budget: tokens of the blocks that a layer reads in the mean.
    least: blocks that are read in any case.
    densities: of each layer, see `densities_of`; (): all alike.
  """

  least: int = 32
  densities: tuple[float, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    if self.least < 1:
      raise ValueError(f"least={self.least}: must be 1 or more")
    if any(not x > 0 for x in self.densities):
      raise ValueError(f"densities={self.densities}: must be above 0")

  def check(self, layer, prompt):
    if self.densities and len(self.densities) != layer.depth:
      raise ValueError(
        f"densities={self.densities}: {len(self.densities)} given for"
        f" {layer.depth} layers; give one for each, or ()"
      )

  def memo(self, layer, n):
    """Also the usual query, and the sum and number of densities so far."""
    channels = layer.heads * layer.head_dim
    zero = jnp.zeros((), jnp.float32)
    return *super().memo(layer, n), Usual.empty(channels), zero, zero

  def relevance(self, layer, chunk, q, reps, blocks, *more: Any):
    usual, total, count = more
    flat = q.astype(jnp.float32).reshape(q.shape[0], -1)
    usual = usual.seen(flat, chunk.valid)
    score = unit(reps.reshape(len(reps), -1)) @ unit(
      probe(usual, flat, chunk.valid)
    )
    counts = chunk.valid.any() & (blocks > 1)
    new = density(score, jnp.arange(len(reps)) < blocks)
    total = total + jnp.where(counts, new, 0.0)
    return score, usual, total, count + counts

  def share(self, layer, chunk, blocks):
    most, count = super().share(layer, chunk, blocks)
    own = within(count, count, blocks, self.least)
    if self.densities:
      of_layers = shares(count, blocks, self.densities, self.least)
      decoding = chunk.now > chunk.prompt
      own = jnp.where(decoding, jnp.stack(of_layers)[layer.number], own)
    return max(2 * most, self.least), own


def densities_of(states: Sequence[Any]) -> tuple[float, ...]:
  """Mean density of every layer, from the states of a `Retriever`.

  For the option `densities`, from sample texts that were read and continued.

  Raises:
    ValueError: a layer has never searched more than one block.
  """
  found = []
  for i, state in enumerate(states):
    *_, total, count = state.memo
    if not float(count.sum()) > 0:
      raise ValueError(
        f"layer {i} has never searched more than one block; read longer texts"
      )
    found.append(float(total.sum() / count.sum()))
  return tuple(found)


def unit(x: Float[Array, "*a c"]) -> Float[Array, "*a c"]:
  """At length one; zeros stay."""
  length = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return x / jnp.maximum(length, 1e-12)
