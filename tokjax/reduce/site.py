"""What a rule sees of one example at one place of a model.

Protected tokens are set aside before a rule and put in front again behind it,
here and nowhere else.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tokjax.plan import Assignment, Mixture, Plan
from tokjax.tokens import Signals, Tokens


@dataclasses.dataclass(frozen=True)
class Site:
  """What a rule sees of one example at one place of the model.

  The properties show free tokens only, `f` of the `n` there are; `tokens` and
  `signals` are complete, with the protected ones.

  Attributes:
    keep: free tokens that remain (static).
    layer, depth: index of this block, number of blocks.
    protected: how many tokens take no part; `order` puts them first.
    count: how many free tokens this example may keep when its batch is padded
      (traced); None: `keep`.
    grid: rows and columns the free tokens form, None once they are reduced.
    key: random key of this example and block, for rules that need "key".
    order: permutation that puts the protected tokens first; None: they are.
  """

  tokens: Tokens
  signals: Signals
  keep: int
  layer: int = 0
  depth: int = 1
  protected: int = 0
  count: Int[Array, ""] | None = None
  grid: tuple[int, int] | None = None
  key: PRNGKeyArray | None = None
  order: Int[Array, "n"] | None = None

  @property
  def num_free(self) -> int:
    return self.tokens.num_tokens - self.protected

  @property
  def remove(self) -> int:
    return self.num_free - self.keep

  def free(self, values: Array, axis: int = 0) -> Array:
    """The free tokens' part of an array along its token axis."""
    if self.order is None:
      n = values.shape[axis]
      return jax.lax.slice_in_dim(values, self.protected, n, axis=axis)
    return jnp.take(values, self.order[self.protected :], axis=axis)

  def with_free(self, values: Array, free: Array) -> Array:
    """`values` of all tokens, with those of the free ones replaced."""
    if self.order is None:
      return values.at[self.protected :].set(free)
    return values.at[self.order[self.protected :]].set(free)

  @property
  def x(self) -> Float[Array, "f d"]:
    return self.free(self.tokens.x)

  @property
  def size(self) -> Float[Array, "f"]:
    return self.free(self.tokens.size)

  @property
  def position(self) -> Float[Array, "f p"]:
    return self.free(self.tokens.position)

  @property
  def mask(self):
    mask = self.tokens.mask
    return None if mask is None else self.free(mask)

  def _signal(self, name: str, axis: int) -> Array:
    value = getattr(self.signals, name)
    if value is None:
      raise ValueError(
        f"the signal {name!r} is absent: name it in the recipe's `needs`"
      )
    return self.free(value, axis)

  @property
  def keys(self) -> Float[Array, "h f k"]:
    return self._signal("keys", 1)

  @property
  def queries(self) -> Float[Array, "h f k"]:
    return self._signal("queries", 1)

  @property
  def values(self) -> Float[Array, "h f k"]:
    return self._signal("values", 1)

  @property
  def class_attention(self) -> Float[Array, "h f"]:
    return self._signal("class_attention", 1)

  @property
  def received_attention(self) -> Float[Array, "h f"]:
    return self._signal("received_attention", 1)

  @property
  def attention(self) -> Float[Array, "h n n"]:
    """The whole map, protected tokens included."""
    value = self.signals.attention
    if value is None:
      raise ValueError(
        "the signal 'attention' is absent: name it in the recipe's `needs`"
      )
    return value

  def lift(self, plan: Plan) -> Plan:
    """A plan over the free tokens as one over all: the protected stay, first.

    Where protected tokens do not lead the sequence, outputs are put back into
    the order of their anchors.
    """
    p = self.protected
    if p == 0 and self.order is None:
      return plan
    if isinstance(plan, Mixture):
      plan = _lift_mixture(plan, p)
    else:
      plan = _lift_assignment(plan, p)
    if self.order is None:
      return plan
    arrange = Assignment.select(self.order, self.tokens.num_tokens)
    plan = arrange.then(plan)
    last = jnp.argsort(plan.anchor)
    return plan.then(Assignment.select(last, plan.num_outputs))


def _lift_assignment(plan: Assignment, p: int) -> Assignment:
  def extend(values, head):
    if values is None:
      return None
    return jnp.concatenate([jnp.full((p,), head, values.dtype), values])

  return Assignment(
    anchor=jnp.concatenate([jnp.arange(p), plan.anchor + p]),
    rest=None if plan.rest is None else plan.rest + p,
    into=None if plan.into is None else plan.into + p,
    valid=extend(plan.valid, True),
    anchor_weight=extend(plan.anchor_weight, 1.0),
    rest_weight=plan.rest_weight,
    num_sources=plan.num_sources + p,
  )


def _lift_mixture(plan: Mixture, p: int) -> Mixture:
  def extend(matrix):
    m, n = matrix.shape
    return (
      jnp.zeros((m + p, n + p))
      .at[:p, :p]
      .set(jnp.eye(p))
      .at[p:, p:]
      .set(matrix)
    )

  valid = plan.valid
  if valid is not None:
    valid = jnp.concatenate([jnp.ones((p,), bool), valid])
  return Mixture(
    extend(plan.weight),
    extend(plan.share),
    extend(plan.back),
    jnp.concatenate([jnp.arange(p), plan.anchor + p]),
    valid,
  )
