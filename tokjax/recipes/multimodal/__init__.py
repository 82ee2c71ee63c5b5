"""Recipes for vision-language models: visual tokens before and inside them."""

from tokjax.recipes.multimodal import encoder
from tokjax.recipes.multimodal import prumerge
from tokjax.recipes.multimodal import pruning
