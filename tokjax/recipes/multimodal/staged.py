"""Visual tokens are reduced before the language model and again inside it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tokjax import matching, scores
from tokjax.binding import bind
from tokjax.budgets import AtEnd, Budget, Count, Ramp, Ratio, Stages
from tokjax.plan import Plan
from tokjax.recipes.multimodal.encoder import (
  CLASS_SUM,
  dominant_and_contextual,
)
from tokjax.recipes.multimodal.pruning import VISUAL
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import KeepTop
from tokjax.reduce.site import Site
from tokjax.signals import Attention, Keys, Of, Rows, asks
from tokjax.slots import Slots

TO_NONE = Ramp(0.0)


@recipe(
  "visiondrop",
  family="vlm",
  paper="Rethinking Visual Token Reduction in LVLMs under Cross-modal"
  " Misalignment",
  arxiv="2506.22283",
  code="Ruixxxx/VisionDrop",
  evidence="Ruixxxx/VisionDrop:llava/model/modeling_llama_visiondrop.py"
  " (f7a9444), its ranking and merging run next to these on the same states",
  deviations="in the encoder 1 of 8 tokens is contextual and in the language"
  " model 5 of 32 (7 of 48, 26 and 19 tokens: 6, 5, 4 and 3, as published);"
  " counts are fractions of the tokens that arrive at the language model, so"
  " that they hold for any number of images; heads of a group share their key"
  " head (the official ranking takes ungrouped heads only)",
)
def visiondrop(
  budget: Budget = Count(47),
  stages: tuple[tuple[int | float, float], ...] = (
    (0.25, 0.7292),
    (0.5, 0.5417),
    (0.75, 0.3959),
  ),
) -> Slots:
  """VisionZip in the encoder and, by visual tokens alone, at some blocks.

  There visual tokens are ranked by what they receive from each other, and the
  rest merges into a few of them by the keys of the block.

  Args:
    budget: patches that remain behind the encoder; the class token goes on.
    stages: blocks of the language model and the fraction of its visual tokens
      that remains there.
  """
  encoder = bind(
    dominant_and_contextual, share=(1, 8), score=CLASS_SUM, metric=Keys()
  )
  inside = bind(
    dominant_and_contextual, share=(5, 32),
    score=Rows(of=Of(VISUAL.kinds), over="mean"), metric=Keys(rotated=True),
  )  # fmt: skip
  vision = Reduce(encoder, AtEnd(budget), at="output")
  return Slots(
    Reduce(inside, Stages(stages), free=VISUAL, position="renumber"),
    towers={"vision": Slots(vision, pass_class=True)},
  )


def merge_pairs(site: Site) -> Plan:
  """Every second token joins the most similar of the others: plain means."""
  n, x = site.num_free, site.x.astype(jnp.float32)
  sides = matching.parity(n, mask=site.mask)
  plan = matching.bipartite(
    scores.cosine(x[sides.source], x[sides.target]), sides, n, site.remove,
    mask=site.mask, count=site.due, unmerged="similarity",
  )  # fmt: skip
  return plan.weighted(jnp.ones((n,), jnp.float32))


@asks(Attention())
def votes(
  site: Site, *, temperature: float, iterations: int
) -> Float[Array, "f"]:
  """Page rank on sharpened attention, root mean square over heads, in logs."""
  attention = site.attention.astype(jnp.float32)
  # The softmax of logits over a temperature is a power of that of logits.
  top = attention.max(axis=-1, keepdims=True)
  sharp = (attention / jnp.where(top > 0, top, 1.0)) ** (1 / temperature)
  total = sharp.sum(axis=-1, keepdims=True)
  real = jnp.ones((site.tokens.num_tokens,), bool)
  real = real if site.tokens.mask is None else site.tokens.mask
  rank = scores.pagerank(
    sharp / jnp.where(total > 0, total, 1.0), iterations=iterations,
    start=real.astype(jnp.float32),
  )  # fmt: skip
  # Squares of small ranks would be zero.
  return site.free(jax.nn.logsumexp(2 * jnp.log(rank), axis=0))


@recipe(
  "aim",
  family="vlm",
  paper="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and"
  " Pruning",
  arxiv="2412.03248",
  code="LaVi-Lab/AIM",
  evidence="LaVi-Lab/AIM:llava/model/token_merge.py, other_packages/"
  "transformers/src/transformers/models/qwen2/modeling_qwen2.py (edc24e9),"
  " merging and page rank run next to these on the same arrays",
  deviations="what is removed no longer votes in later blocks (the official"
  " code hides it from the others and lets it vote); at least one visual token"
  " stays; n tokens become n - n // 2 in each merge (there n // 4 go in the"
  " second, which is one less where n leaves 3 when divided by 4)",
)
def aim(
  merges: int = 2,
  budget: Budget = TO_NONE,
  temperature: float = 0.1,
  iterations: int = 5,
) -> Slots:
  """Merges similar visual tokens, then prunes block by block to none.

  Args:
    merges: how often every second token merges before the language model.
    budget: of the visual tokens in the language model.
    temperature: of the attention that votes.
    iterations: of page rank.
  """
  if merges < 1 or iterations < 0:
    raise ValueError(
      f"merges={merges}, iterations={iterations}: must be 1 or more, and 0 or"
      " more"
    )
  if not temperature > 0:
    raise ValueError(f"temperature={temperature}: must be positive")
  merge = Reduce(
    merge_pairs, Ratio(0.5, (0,), "current", "ceil"), at="output", at_most=0.5
  )
  rule = KeepTop(bind(votes, temperature=temperature, iterations=iterations))
  return Slots(
    Reduce(rule, budget, at="output", free=VISUAL),
    towers={"projector": Slots((merge,) * merges)},
  )
