"""Recipes for vision encoders."""

from tokjax.recipes.vision import baselines
from tokjax.recipes.vision import clustering
from tokjax.recipes.vision import merging
from tokjax.recipes.vision import learned
from tokjax.recipes.vision import pruning
