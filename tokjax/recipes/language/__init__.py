"""Recipes for language models: attention, retrieval, caches."""

from tokjax.recipes.language import sparse_attention
from tokjax.recipes.language import condensed
from tokjax.recipes.language import recalibrated
from tokjax.recipes.language import retrieval
from tokjax.recipes.language import eviction
from tokjax.recipes.language import stores
