"""Visual tokens are pruned inside a language model, while it reads a prompt.

Text stays; which visual tokens go is said by attention from the text. The
kinds of the tokens are given with the prompt: `Generator.prefill(prompts,
kinds=...)` or `Decoder.apply(tokens, kind=...)`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tokjax import matching, selection
from tokjax.binding import bind
from tokjax.budgets import Beyond, Budget, Once, Recycled, Share, Stages
from tokjax.plan import Assignment
from tokjax.recipes.registry import recipe
from tokjax.reduce.free import Free
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import KeepTop, keep_top
from tokjax.reduce.site import Site
from tokjax.signals import Block, By, Derived, Last, Rows
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens

VISUAL = Free((Kind.VISUAL,))


def recycled(*best: int, **options: float) -> Recycled:
  """So many of the arriving tokens are best, behind SparseVLM's blocks."""
  blocks = (1 / 16, 3 / 16, 15 / 32)
  return Recycled(tuple(zip(blocks, best, strict=True)), **options)


# SparseVLM's tables, by how many of 576 tokens 32 blocks see on average.
SPARSEVLM = {
  192: recycled(300, 200, 110),
  128: recycled(303, 110, 36),
  96: recycled(238, 48, 26),
  64: recycled(66, 30, 17),
}
# Of version 2, which recycles nothing.
SPARSEVLM_PLUS = {
  192: recycled(300, 200, 118, pooled=0.0),
  128: recycled(238, 108, 60, pooled=0.0),
  96: recycled(246, 54, 28, pooled=0.0),
  64: recycled(66, 34, 20, pooled=0.0),
}


@recipe(
  "fastv",
  family="vlm",
  paper="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference"
  " Acceleration for Large Vision-Language Models",
  arxiv="2403.06764",
  code="pkunlp-icler/FastV",
  evidence="pkunlp-icler/FastV:src/FastV/llava-hf (d165972)",
  deviations="every example keeps its own tokens (the official code applies"
  " those of the first to the whole batch); at least one visual token stays",
)
def fastv(layer: int | float = 2) -> Slots:
  """The last token's attention in the block before says which tokens stay.

  Args:
    layer: block before which half of the visual tokens go, as a number or a
      fraction of the depth.
  """
  rule = keep_top(Rows(of=Last(), layer=-1, over="mean"))
  return Slots(Reduce(rule, Once(0.5, layer), free=VISUAL))


@recipe(
  "pyramiddrop",
  family="vlm",
  paper="PyramidDrop: Accelerating Your Large Vision-Language Models via"
  " Pyramid Visual Redundancy Reduction",
  arxiv="2410.17247",
  code="Cooperx521/PyramidDrop",
  evidence="Cooperx521/PyramidDrop:llava/model/modeling_llama_pdrop.py"
  " (6444f30)",
  deviations="inference only (training ranks by the tokens before each answer);"
  " heads of a group share their key head (the official ranking takes"
  " ungrouped heads only); at least one visual token stays",
)
def pyramiddrop(
  stages: tuple[tuple[int | float, float], ...] = (
    (0.25, 0.5),
    (0.5, 0.25),
    (0.75, 0.125),
  ),
) -> Slots:
  """At some blocks the last token ranks visual tokens as the block will.

  Queries and keys are those of the block whose input is reduced.

  Args:
    stages: pairs of a block, as a number or a fraction of the depth, and the
      fraction of the visual tokens that remain from it on.
  """
  rule = keep_top(Rows(of=Last(), over="mean"))
  return Slots(
    Reduce(rule, Stages(stages), free=VISUAL, position="renumber")
  )


def behind_image(tokens: Tokens, *, last: int = 0) -> Bool[Array, "n"]:
  """Which real tokens stand behind the visual ones; all if there are none.

  Args:
    tokens: of a prompt.
    last: so many visual tokens at their end count as behind.
  """
  n = tokens.num_tokens
  real = jnp.ones((n,), bool) if tokens.mask is None else tokens.mask
  visual = real & (tokens.kind == Kind.VISUAL)
  inside = visual & (jnp.cumsum(visual[::-1])[::-1] > last)
  place = jnp.arange(n)
  return real & (place > jnp.where(inside, place, -1).max())


def raters(tokens: Tokens) -> Float[Array, "n"]:
  """1 for the text tokens behind the image that rate it, 0 for all others.

  Each visual token spreads one unit over the text behind it, by the softmax of
  their products; text that receives more than the mean rates. Where none
  does (a single token), all of it rates.
  """
  x = tokens.x.astype(jnp.float32)
  real = jnp.ones(tokens.kind.shape, bool)
  real = real if tokens.mask is None else tokens.mask
  visual = real & (tokens.kind == Kind.VISUAL)
  text = behind_image(tokens) & (tokens.kind == Kind.TEXT)
  share = jax.nn.softmax(x @ x.T, axis=-1, where=text[None, :])
  received = jnp.where(visual[:, None], share, 0.0).sum(axis=0)
  mean = received.sum() / jnp.maximum(text.sum(), 1)
  above = text & (received > mean)
  return jnp.where(above.any(), above, text).astype(jnp.float32)


RATED = Rows(of=By(Derived(Block(0), raters)), over="mean")


def recycle(site: Site, *, question: Rows) -> Assignment:
  """Keeps the best and appends clusters of the best of the others.

  The site's budget is a `Recycled`. Clusters are plain means and stand behind
  the kept tokens, the one with the highest density peak first.
  """
  budget, n = site.budget, site.num_free
  if not isinstance(budget, Recycled):
    raise ValueError(
      f"budget={budget!r}: must be a tokjax.budgets.Recycled, which says how"
      " many tokens are kept and how many clusters are added"
    )
  mask = jnp.ones((n,), bool) if site.mask is None else site.mask
  table = lambda count: np.array([count(i) for i in range(n + 1)], np.int32)
  best = table(lambda i: budget.best(i, site.layer, site.depth) or 0)
  pool, clusters = table(budget.pool), table(budget.clusters)
  arriving = mask.sum(dtype=jnp.int32)
  stay = jnp.asarray(best)[arriving]
  gone = arriving - stay
  rank = selection.places(site[question], mask=mask)
  pooled = mask & (rank >= stay) & (rank < stay + jnp.asarray(pool)[gone])
  index, real = selection.of_mask(pooled, int(pool.max()), order=rank)
  found = matching.dpc_knn(
    site.x[index].astype(jnp.float32), int(clusters.max()), neighbours=None,
    mask=real, count=jnp.asarray(clusters)[gone],
  )  # fmt: skip
  centre = index[found.anchor]
  place = jnp.arange(n)
  at = jnp.where(real, index, n)
  into = centre[jnp.minimum(found.index, found.num_outputs - 1)]
  parent = jnp.where(mask & (rank < stay), place, n)
  parent = parent.at[at].set(into, mode="drop")
  order = place.at[jnp.where(found.valid, centre, n)].set(
    n + jnp.arange(found.num_outputs), mode="drop"
  )
  plan = Assignment.from_parent(
    parent, site.keep, order=order, mask=mask, full=False, exact=False
  )
  return plan.weighted(jnp.ones((n,), jnp.float32))


@recipe(
  "sparsevlm",
  family="vlm",
  paper="SparseVLM: Visual Token Sparsification for Efficient Vision-Language"
  " Model Inference",
  arxiv="2410.04417",
  code="Gumpest/SparseVLMs",
  evidence="Gumpest/SparseVLMs:llava/model/language_model (26a5f48), version 1",
  deviations="blocks are fractions of the depth (2, 6 and 15 of 32); no noise"
  " on densities; a single text token behind the image rates it (the official"
  " code finds no rater then)",
)
def sparsevlm(
  budget: Budget = SPARSEVLM[192],
) -> Slots:
  """Text that belongs to the image rates its tokens; some are recycled."""
  rule = bind(recycle, question=RATED)
  return Slots(
    Reduce(rule, budget, at="output", free=VISUAL, position="renumber")
  )


def priority(
  site: Site, *, question: Rows, heads: int
) -> Float[Array, "f"]:
  """Mean over the heads whose answers about free tokens sum to the most."""
  answer = site[question].astype(jnp.float32)
  if site.mask is not None:
    answer = jnp.where(site.mask, answer, 0.0)
  _, best = jax.lax.top_k(answer.sum(axis=-1), min(heads, len(answer)))
  return answer[best].mean(axis=0)


@recipe(
  "sparsevlm_plus",
  family="vlm",
  paper="SparseVLM+: Visual Token Sparsification with Improved Text-Visual"
  " Attention Pattern",
  arxiv="2410.04417",
  code="Gumpest/SparseVLMs",
  evidence="Gumpest/SparseVLMs:llava/model/language_model (72cd202, branch"
  " v2.0, USE_VERSION=2_0)",
  deviations="blocks are fractions of the depth (2, 6 and 15 of 32); a single"
  " text token behind the image rates it; at least one visual token stays; a"
  " model with fewer heads than `heads` takes all (the official code fails)",
)
def sparsevlm_plus(
  budget: Budget = SPARSEVLM_PLUS[192], heads: int = 14
) -> Slots:
  """SparseVLM's raters without the pull of near places, by their best heads.

  Attention of the raters is divided by what rotary positions alone give.

  Args:
    budget: how many tokens stay, and behind which blocks.
    heads: so many of the heads count that give the image most of what is left.
  """
  if heads < 1:
    raise ValueError(f"heads={heads}: must be 1 or more")
  question = dataclasses.replace(RATED, form="by_rotation", over=None)
  rule = KeepTop(bind(priority, question=question, heads=heads))
  return Slots(Reduce(rule, budget, at="output", free=VISUAL))


def followers(tokens: Tokens, *, last: int) -> Float[Array, "n"]:
  """1 for the tokens behind those that compete, 0 for all others."""
  return behind_image(tokens, last=last).astype(jnp.float32)


@recipe(
  "scm",
  family="vlm",
  paper="Mini-Monkey: Alleviating the Semantic Sawtooth Effect for Lightweight"
  " MLLMs via Complementary Image Pyramid",
  arxiv="2408.02034",
  code="Yuliang-Liu/Monkey",
  evidence="Yuliang-Liu/Monkey:project/mini_monkey/internvl/model/"
  "internvl_chat/modeling_minimonkey_chat.py (8c0344c), its selection run next"
  " to this one on the same attention",
  deviations="the official code drops one token more, the first behind those"
  " that compete, by an index that is one too large; every example keeps its"
  " own tokens; of several images in a prompt all tokens compete, and `first`"
  " and `last` are those of the whole prompt; at least one token stays",
)
def scm(first: int = 0, last: int = 0) -> Slots:
  """The scale compression mechanism: two blocks choose, then all start anew.

  What stands behind the visual tokens, text or a smaller view of the image,
  attends to them in the second block. The best half goes through all blocks
  again, with the text, as if the others had never been there.

  Args:
    first, last: visual tokens at either end that stay in any case: those of a
      view at low resolution.
  """
  free = Free((Kind.VISUAL,), first, last)
  question = Rows(of=By(Derived(Block(0), bind(followers, last=last))))
  budget = Once(Beyond(Share(0.5), first + last), 1)
  return Slots(
    Reduce(keep_top(question), budget, at="output", free=free, again=True)
  )
