"""Plans: which input token goes into which output token, and how much of it.

A plan is written down once and then moves everything: features, sizes,
positions, masks, keys and values, provenance. Every plan is a matrix `P [m, n]`
(`plan.matrix()`); `Assignment` is the sparse form in which each source goes
to one output at most, `Mixture` the dense one.

All arrays are those of one example; lift with `jax.vmap`. The vmapped gathers
and scatters shard over the batch without collectives, which hand-batched ones
do not.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from tokjax.tokens import Tokens

Lowering = Literal["gather", "scatter", "onehot"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignment:
  """Each source goes into one output token, or nowhere.

  Every output has an *anchor*, the source whose place, position and kind it
  takes. The `rest` are sources that join the output of another anchor. This
  form makes the common cases cheap: pruning is one gather of m rows, merging
  adds a scatter of the few rows that move.

  Attributes:
    anchor: distinct sources, one an output, `[m]`.
    rest: sources that are not anchors, `[r]`; None: they are all dropped.
    into: the output each of the rest goes to, `[r]`; m means dropped.
    valid: False for outputs that stand for nothing (an adaptive method that
      needed fewer than its capacity), `[m]`; None: all are valid.
    anchor_weight: how much of an anchor enters its output, `[m]`; None: 1.
    rest_weight: the same for the rest, `[r]`; None: 1.
  """

  anchor: Int[Array, "*b m"]
  rest: Int[Array, "*b r"] | None = None
  into: Int[Array, "*b r"] | None = None
  valid: Bool[Array, "*b m"] | None = None
  anchor_weight: Float[Array, "*b m"] | None = None
  rest_weight: Float[Array, "*b r"] | None = None
  num_sources: int = dataclasses.field(
    default=-1, metadata={"static": True}, kw_only=True
  )

  @property
  def num_outputs(self) -> int:
    return self.anchor.shape[-1]

  @classmethod
  def identity(cls, n: int) -> "Assignment":
    return cls(jnp.arange(n), num_sources=n)

  @classmethod
  def select(
    cls,
    index: Int[Array, "m"],
    n: int,
    valid: Bool[Array, "m"] | None = None,
  ) -> "Assignment":
    """Keeps the sources `index` in that order and drops the others."""
    return cls(index, valid=valid, num_sources=n)

  @classmethod
  def from_parent(
    cls,
    parent: Int[Array, "n"],
    m: int,
    *,
    order: Int[Array, "n"] | None = None,
    mask: Bool[Array, "n"] | None = None,
    full: bool = True,
    exact: bool = True,
  ) -> "Assignment":
    """Builds a plan from the anchor that each source goes to.

    Args:
      parent: `parent[j] == j` makes j an anchor, another anchor's index lets
        j join it, and n drops it.
      m: number of outputs (static).
      order: anchors stand in ascending `order` (default: of index).
      mask: padded sources are neither anchors nor members. If there are fewer
        anchors than m, the outputs left over are invalid.
      full: promises m anchors wherever there is no mask, so that unpadded
        batches stay free of masks.
      exact: promises that at most n - m sources join others, so that the
        scatter moves n - m rows; False allows any number.
    """
    n = parent.shape[0]
    iota = jnp.arange(n)
    order = iota if order is None else order
    is_anchor = parent == iota
    joins = (parent != iota) & (parent < n)
    if mask is not None:
      is_anchor &= mask
      joins &= mask
    # Anchors first, then what is dropped (it may fill outputs that stand for
    # nothing), and what moves last, so that it never becomes a filler.
    tier = jnp.where(is_anchor, 0, jnp.where(joins, 2, 1))
    perm = jnp.lexsort((order, tier))
    anchor = perm[:m]
    slot = jnp.zeros((n + 1,), perm.dtype).at[perm].set(iota).at[n].set(m)
    rest = perm[m:] if exact else iota
    target = jnp.minimum(slot[jnp.minimum(parent[rest], n)], m)
    into = jnp.where(joins[rest], target, m)
    valid = None if full and mask is None else is_anchor[anchor]
    return cls(anchor, rest, into, valid, num_sources=n)

  @property
  def index(self) -> Int[Array, "n"]:
    """The output each source goes to, m where it is dropped, `[n]`."""
    m, n = self.num_outputs, self.num_sources
    own, at = jnp.arange(m), self.anchor
    if self.valid is not None:
      # Outputs that are padding may name an anchor of others.
      at = jnp.where(self.valid, at, n)
    index = jnp.full((n,), m, own.dtype).at[at].set(own, mode="drop")
    if self.rest is None:
      return index
    # The anchor of an output that is padding may move elsewhere.
    goes = jnp.where(self.into < m, self.rest, n)
    return index.at[goes].set(self.into, mode="drop")

  @property
  def dropped(self) -> Bool[Array, "n"]:
    return self.index == self.num_outputs

  @property
  def weights(self) -> Float[Array, "n"]:
    """How much of each source enters its output, zero where dropped, `[n]`."""
    own = jnp.ones((self.num_outputs,), jnp.float32)
    if self.anchor_weight is not None:
      own = self.anchor_weight
    n, at = self.num_sources, self.anchor
    if self.valid is not None:
      at = jnp.where(self.valid, at, n)
    weight = jnp.zeros((n,), own.dtype).at[at].set(own, mode="drop")
    if self.rest is None:
      return weight
    moved = jnp.ones(self.rest.shape, own.dtype)
    if self.rest_weight is not None:
      moved = self.rest_weight
    goes = jnp.where(self.into < self.num_outputs, self.rest, n)
    return weight.at[goes].set(moved, mode="drop")

  def weighted(self, weight: Float[Array, "n"]) -> "Assignment":
    """The plan whose outputs are means of their members by `weight`.

    An output whose members all weigh zero takes its anchor's value.
    """
    total = self.total(weight)
    own = jnp.where(total > 0, weight[self.anchor], 1.0)
    total = jnp.where(total > 0, total, 1.0)
    moved = None
    if self.rest is not None:
      moved = weight[self.rest] / jnp.append(total, 1.0)[self.into]
    return dataclasses.replace(
      self, anchor_weight=own / total, rest_weight=moved
    )

  def pruned(self) -> "Assignment":
    """The same anchors; the sources that would have joined are dropped."""
    return Assignment.select(self.anchor, self.num_sources, self.valid)

  def total(self, mass: Num[Array, "n"]) -> Num[Array, "m"]:
    """Sums `mass` over the members of each output: how sizes travel."""
    out = mass[self.anchor]
    if self.valid is not None:
      out = jnp.where(self.valid, out, jnp.zeros_like(out))
    if self.rest is not None:
      out = out.at[self.into].add(mass[self.rest], mode="drop")
    return out

  def apply(
    self, values: Num[Array, "n *f"], *, lowering: Lowering = "gather"
  ) -> Num[Array, "m *f"]:
    """`P @ values`: the values of the outputs.

    Args:
      values: one row a source.
      lowering: how it is compiled; the result is the same. "gather" takes the
        anchors' rows and scatters the rows that move, "scatter" adds all rows
        into zeros, "onehot" multiplies by the dense matrix. See
        `scripts/bench_plan.py` for what was measured.
    """
    if lowering == "onehot":
      matrix = self.matrix().astype(values.dtype)
      return jnp.tensordot(matrix, values, axes=1)
    if lowering == "scatter":
      moved = _scale(self.weights, values)
      zeros = jnp.zeros((self.num_outputs, *values.shape[1:]), values.dtype)
      return zeros.at[self.index].add(moved, mode="drop")
    if lowering != "gather":
      raise ValueError(
        f"lowering={lowering!r}: must be 'gather', 'scatter' or 'onehot'"
      )
    out = _scale(self.anchor_weight, values[self.anchor])
    if self.rest is not None:
      moved = _scale(self.rest_weight, values[self.rest])
      out = out.at[self.into].add(moved, mode="drop")
    if self.valid is not None:
      valid = self.valid.reshape((-1,) + (1,) * (out.ndim - 1))
      out = jnp.where(valid, out, jnp.zeros_like(out))
    return out

  def take(self, values: Shaped[Array, "n *f"]) -> Shaped[Array, "m *f"]:
    """The anchors' own values: how positions and kinds travel."""
    return values[self.anchor]

  def restore(self, values: Num[Array, "m *f"]) -> Num[Array, "n *f"]:
    """Gives every source a copy of its output, zeros where it was dropped."""
    return values.at[self.index].get(mode="fill", fill_value=0)

  def then(self, other: "Plan") -> "Plan":
    """First this plan, then `other`: `other.matrix() @ self.matrix()`."""
    _check_sizes(self, other)
    if isinstance(other, Mixture):
      return self.as_mixture().then(other)
    m, n = other.num_outputs, self.num_sources
    anchor = self.anchor[other.anchor]
    valid = _both(other.valid, self.valid, other.anchor)
    if self.rest is None and other.rest is None:
      weights = (self.anchor_weight, other.anchor_weight)
      if weights == (None, None):
        return Assignment(anchor, valid=valid, num_sources=n)
    index = jnp.append(other.index, m)[self.index]
    weight = self.weights * jnp.append(other.weights, 0.0)[self.index]
    into = index.at[anchor].set(m)
    return Assignment(
      anchor, jnp.arange(n), into, valid, weight[anchor], weight, num_sources=n
    )

  def matrix(self) -> Float[Array, "m n"]:
    """The dense `P [m, n]`."""
    rows = jnp.arange(self.num_outputs)[:, None]
    member = rows == self.index[None, :]
    return jnp.where(member, self.weights[None, :], 0.0)

  def as_mixture(self) -> "Mixture":
    rows = jnp.arange(self.num_outputs)[:, None]
    member = (rows == self.index[None, :]).astype(jnp.float32)
    return Mixture(self.matrix(), member, member.T, self.anchor, self.valid)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
  """Every source may contribute to every output.

  Attributes:
    weight: the matrix `P [m, n]`.
    share: which part of each source's size an output takes over, `[m, n]`;
      columns sum to one when nothing is dropped.
    back: the matrix of `restore`, `[n, m]`.
    anchor: the source whose kind an output takes, `[m]`.
    valid: as in `Assignment`.
  """

  weight: Float[Array, "*b m n"]
  share: Float[Array, "*b m n"]
  back: Float[Array, "*b n m"]
  anchor: Int[Array, "*b m"]
  valid: Bool[Array, "*b m"] | None = None

  @property
  def num_outputs(self) -> int:
    return self.weight.shape[-2]

  @property
  def num_sources(self) -> int:
    return self.weight.shape[-1]

  @property
  def dropped(self) -> Bool[Array, "n"]:
    return self.share.sum(0) == 0

  def matrix(self) -> Float[Array, "m n"]:
    return self.weight

  def as_mixture(self) -> "Mixture":
    return self

  def total(self, mass: Num[Array, "n"]) -> Num[Array, "m"]:
    return self.share.astype(mass.dtype) @ mass

  def apply(self, values: Num[Array, "n *f"]) -> Num[Array, "m *f"]:
    return jnp.tensordot(self.weight.astype(values.dtype), values, axes=1)

  def take(self, values: Shaped[Array, "n *f"]) -> Shaped[Array, "m *f"]:
    return values[self.anchor]

  def restore(self, values: Num[Array, "m *f"]) -> Num[Array, "n *f"]:
    return jnp.tensordot(self.back.astype(values.dtype), values, axes=1)

  def then(self, other: "Plan") -> "Mixture":
    _check_sizes(self, other)
    other = other.as_mixture()
    valid = _both(other.valid, self.valid, other.anchor)
    return Mixture(
      other.weight @ self.weight,
      other.share @ self.share,
      self.back @ other.back,
      self.anchor[other.anchor],
      valid,
    )


Plan = Assignment | Mixture


def move(plan: Plan, tokens: Tokens) -> Tokens:
  """Moves everything of `tokens` [n] through `plan`; returns tokens [m].

  Features are weighted, sizes summed over members, positions and kinds are
  those of the anchors, and an output is masked if its anchor was or if the
  plan says that it is padding.
  """
  if plan.num_sources != tokens.num_tokens:
    raise ValueError(
      f"plan moves {plan.num_sources} tokens but was given {tokens.num_tokens}"
    )
  mask = None if tokens.mask is None else plan.take(tokens.mask)
  if plan.valid is not None:
    mask = plan.valid if mask is None else mask & plan.valid
  size = tokens.size
  if tokens.mask is not None:
    size = jnp.where(tokens.mask, size, 0.0)
  return Tokens(
    x=plan.apply(tokens.x),
    size=plan.total(size),
    position=plan.take(tokens.position),
    kind=plan.take(tokens.kind),
    mask=mask,
    policy=None if tokens.policy is None else plan.take(tokens.policy),
  )


def move_batch(plan: Plan, tokens: Tokens) -> Tokens:
  """`move`, lifted over the batch."""
  return jax.vmap(move)(plan, tokens)


def _scale(weight: Array | None, values: Array) -> Array:
  """Scales rows; products in float32, results in the dtype of `values`."""
  if weight is None:
    return values
  weight = weight.reshape((-1,) + (1,) * (values.ndim - 1))
  return (weight * values).astype(values.dtype)


def _both(
  second: Array | None, first: Array | None, anchor: Array
) -> Array | None:
  """Outputs valid in both of two composed plans."""
  if first is None:
    return second
  return first[anchor] if second is None else second & first[anchor]


def _check_sizes(first: Plan, second: Plan) -> None:
  if first.num_outputs != second.num_sources:
    raise ValueError(
      f"cannot compose: the first plan leaves {first.num_outputs} tokens, the"
      f" second expects {second.num_sources}"
    )
