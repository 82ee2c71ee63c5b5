"""Flax modules of learned recipes: scorers, poolers, modulators."""

from tokjax.learned.context_score import ContextScore
from tokjax.learned.keep_predictor import KeepPredictor
from tokjax.learned.latent_draft import LatentDraft
from tokjax.learned.local_pooling import TokenAwarePooling
from tokjax.learned.modulation import PairModulation
from tokjax.learned.sparse_mask import SparseMask
from tokjax.learned.threshold import Threshold
from tokjax.learned.token_learner import TokenLearner
from tokjax.learned.tree_attention import TreeCrossAttention

__all__ = [
  "ContextScore",
  "KeepPredictor",
  "LatentDraft",
  "PairModulation",
  "SparseMask",
  "Threshold",
  "TokenAwarePooling",
  "TokenLearner",
  "TreeCrossAttention",
]
