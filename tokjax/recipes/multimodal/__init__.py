"""Recipes for vision-language models: visual tokens inside a decoder."""

from tokjax.recipes.multimodal import pruning
