"""Recipes for vision-language models: visual tokens before and inside them."""

from tokjax.recipes.multimodal import encoder
from tokjax.recipes.multimodal import density
from tokjax.recipes.multimodal import diverse
from tokjax.recipes.multimodal import flowcut
from tokjax.recipes.multimodal import fold
from tokjax.recipes.multimodal import graph
from tokjax.recipes.multimodal import dymu
from tokjax.recipes.multimodal import holov
from tokjax.recipes.multimodal import prumerge
from tokjax.recipes.multimodal import covipal
from tokjax.recipes.multimodal import flash
from tokjax.recipes.multimodal import crops
from tokjax.recipes.multimodal import vflowopt
from tokjax.recipes.multimodal import frames
from tokjax.recipes.multimodal import mustdrop
from tokjax.recipes.multimodal import pruning
from tokjax.recipes.multimodal import dart
from tokjax.recipes.multimodal import transition
from tokjax.recipes.multimodal import trim
from tokjax.recipes.multimodal import scatter
from tokjax.recipes.multimodal import staged
from tokjax.recipes.multimodal import vla
from tokjax.recipes.multimodal import catp
from tokjax.recipes.multimodal import sinks
from tokjax.recipes.multimodal import recoverable
