"""A second encoder whose features stand behind those of the first, by channel.

It has no slots: reductions of the first encoder decide, and their plans move
the features of both.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax.plan import Plan
from tokjax.slots import Slots
from tokjax.tokens import Tokens


def follow(
  x: Float[Array, "k n d"], front: int, plans: Iterable[Plan]
) -> Float[Array, "k m d"]:
  """Features of patches, moved as reductions of the other encoder move its own.

  Args:
    x: of all patches.
    front: tokens that the other encoder has in front of its patches.
    plans: of the reductions, in order.

  Returns:
    Those of the patches that remain.
  """
  x = jnp.pad(x, ((0, 0), (front, 0), (0, 0)))
  for plan in plans:
    x = jax.vmap(lambda plan, x: plan.apply(x))(plan, x)
  return x[:, front:]


def join(tokens: Tokens, beside: Float[Array, "k m d"]) -> Tokens:
  """Tokens whose features are followed by further ones."""
  return tokens.replace(x=jnp.concatenate([tokens.x, beside], axis=-1))


def check(slots: Sequence[tuple[str, Slots]]) -> None:
  """Raises ValueError for slots of which a second encoder cannot follow plans.

  Args:
    slots: of the towers before the features are joined, with their names.
  """
  for tower, own in slots:
    why = []
    if own.pass_class:
      why.append("passes the class token on, of which it has no features")
    if own.program is not None:
      why.append("changes the image, which plans do not say")
    if any(r.back for r in own.reduce):
      why.append("gives tokens back, of which it knows nothing")
    if any(r.combine is not None for r in own.reduce):
      why.append("makes features that are no weighted sums of others")
    if why:
      raise ValueError(
        f"recipe {own.name!r}, tower {tower!r}: the features of a second"
        f" encoder follow the plans of the first, and this {' and '.join(why)};"
        " use a recipe that only reduces, or one of the tower 'projector'"
      )
