"""Recipes for language models: attention, retrieval, caches."""

from tokjax.recipes.language import attention
from tokjax.recipes.language import retrieval
from tokjax.recipes.language import eviction
from tokjax.recipes.language import stores
