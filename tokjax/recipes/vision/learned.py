"""Vision recipes with parameters of their own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import budgets, learned, losses, selection
from tokjax.budgets import Budget
from tokjax.plan import Assignment, Mixture, Plan
from tokjax.recipes.registry import recipe
from tokjax.recipes.vision import merging
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.site import Site
from tokjax.signals import Attention, Random, asks
from tokjax.slots import Slots


def dynamicvit_rule(site: Site) -> Plan:
  """Keeps the tokens with the largest log-probability of being kept."""
  keep_score = site.learned[:, 0]
  index, valid = selection.top_k(
    keep_score, site.keep, mask=site.mask, count=site.due
  )
  return Assignment.select(index, site.num_free, valid)


@asks(Random())
def dynamicvit_soft(site: Site):
  """Keep bits drawn with Gumbel noise, straight through."""
  return losses.gumbel_keep(site.key, site.learned)


@recipe(
  "dynamicvit",
  family="vision",
  paper="DynamicViT: Efficient Vision Transformers with Dynamic Token"
  " Sparsification",
  arxiv="2106.02034",
  code="raoyongming/DynamicViT",
  training="learned",
  evidence="raoyongming/DynamicViT:models/dyvit.py, losses.py, main.py",
  deviations="the teacher's tokens are not distilled, only its logits"
  " (`task.distill`); counts are exact, where int(n * r ** t) of the code may"
  " give one token less",
)
def dynamicvit(budget: Budget = budgets.Ratio(0.7)) -> Slots:
  """Keeps the tokens that a predictor, trained with Gumbel bits, votes for.

  Trains softly: absent tokens stay but are not seen. Infers by gathering.
  """
  reduce = Reduce(
    dynamicvit_rule,
    budget,
    soft=dynamicvit_soft,
    learned=learned.KeepPredictor(),
  )
  return Slots(reduce, losses=(losses.Ratio(weight=2.0),))


def token_learner_rule(site: Site) -> Plan:
  """Averages of all tokens by the softmax over tokens of learned logits."""
  logits = jnp.asarray(site.learned, jnp.float32)
  weight = jax.nn.softmax(logits, axis=0).T
  share = weight / jnp.maximum(weight.sum(axis=0, keepdims=True), 1e-30)
  return Mixture(weight, share, share.T, distinct_peaks(weight))


def distinct_peaks(weight: Float[Array, "m n"]) -> Int[Array, "m"]:
  """The largest entry of every row that no row before it has taken."""

  def pick(free, row):
    peak = jnp.argmax(jnp.where(free, row, -1.0))
    return free.at[peak].set(False), peak

  return jax.lax.scan(pick, jnp.ones(weight.shape[1:], bool), weight)[1]


@recipe(
  "token_learner",
  family="vision",
  paper="TokenLearner: What Can 8 Learned Tokens Do for Images and Videos?",
  arxiv="2106.11297",
  code="google-research/scenic",
  training="learned",
  evidence="google-research/scenic:scenic/projects/token_learner/model.py"
  " (v1.1)",
  deviations="a class token, where there is one, is set aside; no fuser",
)
def token_learner(budget: Budget = budgets.Once(0.25, 0.5)) -> Slots:
  """Replaces the tokens once by learned averages of all of them."""
  reduce = Reduce(
    token_learner_rule,
    budget,
    learned=learned.TokenLearner(),
  )
  return Slots(reduce)


@recipe(
  "pyra",
  family="vision",
  paper="PYRA: Parallel Yielding Re-Activation for Training-Inference Efficient"
  " Task Adaptation",
  arxiv="2403.09192",
  code="THU-MIG/PYRA",
  training="learned",
  evidence="THU-MIG/PYRA:model/adaptive_merge.py, tome.py,"
  " vision_transformer_timm.py",
  deviations="low-rank updates of query and value, each its own (the official"
  " one spans query, key and value); no dropout in them",
)
def pyra(budget: Budget = budgets.Constant(16), rank: int = 8) -> Slots:
  """ToMe whose merged tokens are modulated; the backbone stays frozen.

  Args:
    budget: see ToMe; the modulation has one weight a merged pair.
    rank: of the low-rank updates (LoRA) of query and value projections.
  """
  slots = merging.tome(budget)
  (reduce,) = slots.reduce
  reduce = Reduce(
    reduce.rule,
    budget,
    at="mlp",
    at_most=reduce.at_most,
    learned=learned.PairModulation(),
  )
  return Slots(reduce, proportional=True, adapter_rank=rank)


@recipe(
  "sparsifiner",
  family="vision",
  paper="Sparsifiner: Learning Sparse Instance-Dependent Attention for"
  " Efficient Vision Transformers",
  arxiv="2303.13755",
  code="lim142857/Sparsifiner",
  training="learned",
  evidence="lim142857/Sparsifiner:src/models/sparsifiner.py, src/losses.py",
  deviations="attention outside the mask is computed and discarded: the mask is"
  " unstructured and saves no time without a sparse kernel; the first phase"
  " learns the model's own attention, with no gradient to queries and keys, as"
  " where teacher and backbone are the same; tokens are not pruned and the"
  " teacher's tokens not distilled",
)
def sparsifiner(
  share: float = 0.25, predict: bool = False, weight: float = 1.0
) -> Slots:
  """Every query sees the keys that a low-rank predictor of its row selects.

  Args:
    share: of the keys that a query sees.
    predict: first phase of training: attention is dense and the predictor
      learns to reproduce it.
    weight: of the predictor's loss in that phase.
  """
  if not 0 < share <= 1:
    raise ValueError(f"share={share}: must lie in (0, 1]")
  attend = learned.SparseMask(keep=share, predict=predict)
  sown = (losses.Sown("sparsifiner", weight),) if predict else ()
  return Slots(attend=attend, losses=sown)


@recipe(
  "tap_adl",
  family="vision",
  paper="Robustifying Token Attention for Vision Transformers",
  arxiv="2303.11126",
  code="guoyongcs/TAPADL",
  training="learned",
  evidence="guoyongcs/TAPADL:TAPADL_FAN/main.py, models/tap_fan.py",
  deviations="a norm over each image instead of BatchNorm between the pooling's"
  " convolutions; protected tokens, which the official models add later, are"
  " not pooled and take part in the diversity loss",
)
def tap_adl(branches: int = 4, weight: float = 1.0) -> Slots:
  """Attention on locally pooled tokens, trained to be diverse.

  Saves nothing: it makes attention robust.

  Args:
    branches: neighbourhoods that each token chooses from.
    weight: of the diversity loss.
  """
  return Slots(
    attend=learned.TokenAwarePooling(branches),
    collect=(Attention(),),
    losses=(losses.Diversity(weight=weight),),
  )
