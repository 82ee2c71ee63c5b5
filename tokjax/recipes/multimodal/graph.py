"""G-Prune: what a visual token holds flows along a graph of similarities."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import scores
from tokjax.binding import bind
from tokjax.budgets import Budget, Once, Share
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import KeepTop
from tokjax.reduce.site import Site
from tokjax.slots import Slots


def propagated(
  site: Site, *, similarity: float, temperature: float, iterations: int
) -> Float[Array, "f"]:
  """Norms of tokens, passed on along a graph of cosines, for each neighbour."""
  n, x = site.num_free, site.x.astype(jnp.float32)
  mask = jnp.ones((n,), bool) if site.mask is None else site.mask
  cosine = scores.cosine(x, x)
  # A token is its own neighbour, also where it is zero or padding.
  near = ((cosine >= similarity) & mask[None]) | jnp.eye(n, dtype=bool)
  chance = jax.nn.softmax(
    jnp.where(near, cosine / temperature, -jnp.inf), axis=1
  )
  length = jnp.where(mask, jnp.linalg.norm(x, axis=1), 0.0)
  (votes,) = scores.pagerank(
    chance[None], iterations=iterations, start=length
  )
  return votes / near.sum(axis=1)


@recipe(
  "gprune",
  family="vlm",
  paper="What Kind of Visual Tokens Do We Need? Training-free Visual Token"
  " Pruning for Multi-modal Large Language Models from the Perspective of"
  " Graph",
  arxiv="2501.02268",
  code="jytmelon/G-Prune",
  evidence="jytmelon/G-Prune:LLaVA-NeXT/llava/model/llava_arch.py (762c637),"
  " run next to this on the same arrays",
  deviations="each crop of an any-resolution image is a graph of its own (there"
  " the grid of all crops is one)",
)
def gprune(
  similarity: float = 0.5,
  temperature: float = 0.03,
  iterations: int = 5,
  budget: Budget = Once(Share(0.5)),
) -> Slots:
  """Keeps projected tokens to which much flows from tokens like them.

  It asks for no attention, so that it serves encoders without a class token.

  Args:
    similarity: cosine from which on two tokens are neighbours.
    temperature: of the softmax over neighbours.
    iterations: how often what a token holds is passed on.
    budget: how many tokens remain.
  """
  if not temperature > 0:
    raise ValueError(f"temperature={temperature}: must be positive")
  if iterations < 0:
    raise ValueError(f"iterations={iterations}: must be 0 or more")
  rule = KeepTop(
    bind(
      propagated, similarity=similarity, temperature=temperature,
      iterations=iterations,
    )  # fmt: skip
  )
  return Slots(Reduce(rule, budget, at="output")).within("projector")
