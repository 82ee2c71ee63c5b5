"""Visual tokens that are unlike each other, and matter, go on.

What matters is said by the class token (VisPruner, SCOPE, ToDRE) or by the
words of the prompt (CDPruner, MMTok). The latter act at the input of the
language model, where the words are; no block of it sees more tokens.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax import diversity, scores, selection
from tokjax.binding import bind
from tokjax.budgets import AtEnd, Budget, Count, Once, Undecided
from tokjax.plan import Plan
from tokjax.recipes.multimodal.encoder import CLASS_MEAN, CLASS_SUM
from tokjax.recipes.multimodal.pruning import VISUAL, behind_image
from tokjax.recipes.multimodal.transition import BEHIND
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import keep_best, keep_selected
from tokjax.reduce.site import Site
from tokjax.signals import Rows
from tokjax.slots import Slots
from tokjax.tokens import Kind

# What a similarity of words with visual tokens lacks where the words are those
# of a language model.
WORDS = (
  "words are the embeddings of the text behind the image in the language model"
)


def important_and_distinct(
  site: Site, *, score: Rows, share: float, step: int
) -> Plan:
  """The best by a score, and those of the others that have no duplicates."""
  rank = selection.places(site[score], mask=site.mask)
  best, count = int(site.keep * share), None
  if site.due is not None:
    table = jnp.asarray([int(i * share) for i in range(site.keep + 1)])
    best = table[site.due]
    count = site.due - best
  mask = jnp.ones((site.num_free,), bool) if site.mask is None else site.mask
  important = mask & (rank < best)
  x = site.x.astype(jnp.float32)
  others = diversity.distinct(
    scores.cosine(x, x), site.keep - int(site.keep * share), order=rank,
    step=step, mask=mask & ~important, count=count,
  )  # fmt: skip
  chosen = important | others
  return keep_best(site, jnp.where(chosen, 1.0, 0.0))


@recipe(
  "vispruner",
  family="vlm",
  paper="Beyond Text-Visual Attention: Exploiting Visual Cues for Effective"
  " Token Pruning in VLMs",
  arxiv="2412.01818",
  code="Theia-4869/VisPruner",
  evidence="Theia-4869/VisPruner:llava/model/llava_arch.py (aefa01a), run next"
  " to this on the same arrays",
  deviations="lists of an odd length, and of fewer than 16 tokens, lose at most"
  " the half of their tokens in a round (the official code fails)",
)
def vispruner(
  share: float = 0.5, step: int = 8, budget: Budget = Count(64)
) -> Slots:
  """Tokens that the class token attends to, and others without duplicates.

  Args:
    share: of the tokens that remain, chosen by class attention.
    step: how many of the others go in a round, see `tokjax.diversity.distinct`.
    budget: how many patches remain.
  """
  if not 0 <= share <= 1:
    raise ValueError(f"share={share}: must lie in [0, 1]")
  if step < 1:
    raise ValueError(f"step={step}: must be 1 or more")
  rule = bind(important_and_distinct, score=CLASS_MEAN, share=share, step=step)
  return Slots(Reduce(rule, AtEnd(budget), at="output")).within("vision")


def salient_cover(site: Site, *, score: Rows, power: float) -> Plan:
  """Covers all tokens by cosine; what a token adds is weighted by a score."""
  x = site.x.astype(jnp.float32)
  cosine = scores.cosine(x, x)
  if site.mask is not None:
    cosine = jnp.where(site.mask[:, None], cosine, 0.0)
  weight = site[score].astype(jnp.float32) ** power
  picked = diversity.coverage(
    cosine, site.keep, weight=weight, mask=site.mask, count=site.due
  )
  return keep_selected(site, picked)


@recipe(
  "scope",
  family="vlm",
  paper="SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient"
  " Multimodel LLMs",
  arxiv="2510.24214",
  code="kinredon/SCOPE",
  evidence="kinredon/SCOPE:scope/clip_encoder.py (6bf7306), run next to this on"
  " the same arrays",
)
def scope(power: float = 1.0, budget: Budget = Count(64)) -> Slots:
  """Patches that cover the others best, weighted by class attention.

  Args:
    power: of the class attention.
    budget: how many patches remain.
  """
  if not power >= 0:
    raise ValueError(f"power={power}: must be 0 or more")
  rule = bind(salient_cover, score=CLASS_SUM, power=power)
  return Slots(Reduce(rule, AtEnd(budget), at="output")).within("vision")


def from_pivot(
  site: Site, *, score: Rows, over: Literal["nearest", "all"]
) -> Plan:
  """Tokens unlike those before them by cosine, the best by a score first."""
  x = site.x.astype(jnp.float32)
  picked = diversity.max_min(
    1 - scores.cosine(x, x), site.keep, first=site[score].astype(jnp.float32),
    over=over, mask=site.mask, count=site.due,
  )  # fmt: skip
  return keep_selected(site, picked)


# Mean attention of the text behind the images to each visual token.
OF_TEXT = Rows(of=BEHIND, over="mean")


def all_or_none(site: Site, *, attended: Rows, least: float) -> Plan:
  """All tokens if together they have that much attention, else none.

  Where no text stands behind them, all.
  """
  there = jnp.ones((site.num_free,), bool) if site.mask is None else site.mask
  mass = jnp.where(there, site[attended].astype(jnp.float32), 0.0).sum()
  stay = (mass >= least) | ~words(site).any()
  stay = jnp.broadcast_to(stay, there.shape)
  return keep_best(site, there.astype(jnp.float32), eligible=stay)


@recipe(
  "todre",
  family="vlm",
  paper="ToDRE: Visual Token Pruning via Diversity and Task Awareness for"
  " Efficient Large Vision-Language Models",
  arxiv="2505.18757",
  evidence="weak: the text of the paper (version 2); no code was found",
  deviations="the second stage is an option, and masks what it removes: shapes"
  " are static, so that caches count less and nothing is computed less; it asks"
  " for the attention of text behind an image alone, as under a causal mask"
  " images attend to no text behind them; features are those before the"
  " projector, where class attention is known (there projected ones); each crop"
  " keeps its own tokens (there all crops together), in order",
)
def todre(
  over: str = "all",
  budget: Budget = Once(0.1),
  least: float | None = None,
  late: int | float = 0.875,
) -> Slots:
  """Patches that are unlike each other, from the most attended one on.

  The block ahead of the features is asked which patch the class token attends
  to most. In a second stage all visual tokens go that are left, if the text
  hardly attends to them in a late block of the language model.

  Args:
    over: "all": each is the least similar to all before it in sum; "nearest":
      to the nearest of them, as in version 1 of the paper.
    budget: how many patches remain.
    least: the second stage leaves visual tokens if they have this share of the
      attention of the text behind them, 0.1 in the paper; None: there is no
      second stage.
    late: the block that is asked, as a number or a fraction of the depth; the
      tokens go behind it.
  """
  if over not in ("nearest", "all"):
    raise ValueError(f"over={over!r}: must be 'nearest' or 'all'")
  rule = bind(from_pivot, score=CLASS_MEAN, over=over)
  towers = {"ahead": Slots(Reduce(rule, budget))}
  if least is None:
    return Slots(towers=towers)
  if not 0 <= least <= 1:
    raise ValueError(f"least={least}: must lie in [0, 1]")
  second = bind(all_or_none, attended=OF_TEXT, least=least)
  late_stage = Reduce(second, Undecided(late), at="output", free=VISUAL)
  return Slots(late_stage, towers=towers)


def words(site: Site) -> Bool[Array, "n"]:
  """The text behind the image."""
  return behind_image(site.tokens) & (site.tokens.kind == Kind.TEXT)


def relevance(site: Site, *, negated: bool) -> Float[Array, "n"]:
  """Mean cosine of each visual token with the words, scaled to 0..1."""
  x = site.tokens.x.astype(jnp.float32)
  text, visual = words(site), site.mask
  cosine = jnp.where(text[None], scores.cosine(x, x), 0.0)
  mean = cosine.sum(axis=1) / jnp.maximum(text.sum(), 1)
  mean = -mean if negated else mean
  low = jnp.where(visual, mean, jnp.inf).min()
  span = jnp.where(visual, mean, -jnp.inf).max() - low
  scaled = (mean - low + 1e-6) / jnp.where(span > 0, span, 1.0)
  # Without words, or where all are as relevant, only diversity counts.
  return jnp.where(visual & (span > 0), scaled, 1.0)


def conditional_determinant(site: Site, *, negated: bool) -> Plan:
  """Greedy maximum of a determinant, in which relevance scales each token."""
  x = site.tokens.x.astype(jnp.float32)
  weight = relevance(site, negated=negated)
  # Exactly 1 with itself, so that equal relevance is a tie and not rounding.
  itself = jnp.eye(len(x), dtype=bool) & (x != 0).any(axis=1)[None]
  similar = jnp.where(itself, 1.0, scores.cosine(x, x))
  kernel = weight[:, None] * similar * weight[None]
  picked = diversity.determinantal(
    kernel, site.keep, mask=site.mask, count=site.due
  )
  return keep_selected(site, picked)


@recipe(
  "cdpruner",
  family="vlm",
  paper="Beyond Attention or Similarity: Maximizing Conditional Diversity for"
  " Token Pruning in MLLMs",
  arxiv="2506.10967",
  code="Theia-4869/CDPruner",
  evidence="Theia-4869/CDPruner:llava/model/llava_arch.py (9541616), its kernel"
  " and selection run next to these on the same arrays",
  deviations=f"{WORDS} (the official code compares patches with the segments of"
  " the prompt in CLIP, whose text encoder a VisionLanguage does not hold);"
  " relevance is scaled within an example (there within the batch); equal"
  " relevance counts as none; no token is picked twice",
)
def cdpruner(
  budget: Budget = Once(Count(64)), negated: bool = True
) -> Slots:
  """Visual tokens that span most and are relevant to the words.

  A determinantal point process whose kernel is the cosine of projected tokens,
  weighted by the relevance of both.

  Args:
    budget: how many visual tokens remain.
    negated: relevance falls with the cosine, as in the official code; the
      formula of the paper has no sign.
  """
  rule = bind(conditional_determinant, negated=negated)
  return Slots(Reduce(rule, budget, free=VISUAL, position="renumber"))


def covering(
  site: Site, *, text: float, vision: float, share: float
) -> Plan:
  """Covers the words and the visual tokens, by softmax of cosines."""
  x = site.tokens.x.astype(jnp.float32)
  word, visual = words(site), site.mask
  cosine = scores.cosine(x, x)

  def rows(which, temperature):
    spread = jax.nn.softmax(
      jnp.where(visual[None], cosine / temperature, -jnp.inf), axis=1
    )
    return jnp.where(which[:, None], spread, 0.0) / jnp.maximum(which.sum(), 1)

  worth = jnp.concatenate([rows(word, text), share * rows(visual, vision)])
  picked = diversity.coverage(
    worth, site.keep, mask=site.mask, count=site.due
  )
  return keep_selected(site, picked)


@recipe(
  "mmtok",
  family="vlm",
  paper="MMTok: Multimodal Coverage Maximization for Efficient Inference of"
  " VLMs",
  arxiv="2508.18264",
  code="Ironieser/MMTok",
  evidence="Ironieser/MMTok:mmtok/core/semantic_selector.py (d1522cd), run next"
  " to this on the same arrays",
  deviations=f"{WORDS}, all of it (the official code leaves out stop words and"
  " fixed instructions); visual tokens cover each other as projected (there as"
  " features before the projector); of several images in a prompt all tokens"
  " compete",
)
def mmtok(
  budget: Budget = Once(Count(64)),
  text: float = 0.02,
  vision: float = 0.2,
  share: float = 0.5,
) -> Slots:
  """Visual tokens that cover the words and the other visual tokens.

  Args:
    budget: how many visual tokens remain.
    text, vision: temperatures of the softmax over visual tokens, for words and
      for visual tokens.
    share: weight of covering visual tokens; words have weight 1.
  """
  for name, value in (("text", text), ("vision", vision)):
    if not value > 0:
      raise ValueError(f"{name}={value}: must be positive")
  if not share >= 0:
    raise ValueError(f"share={share}: must be 0 or more")
  rule = bind(covering, text=text, vision=vision, share=share)
  return Slots(Reduce(rule, budget, free=VISUAL, position="renumber"))
