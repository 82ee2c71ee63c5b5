"""tokjax: token merging, pruning and sparse attention as pure transforms."""

from tokjax import matching
from tokjax import budgets
from tokjax import scores
from tokjax import selection
from tokjax.plan import Assignment
from tokjax.plan import Mixture
from tokjax.plan import Plan
from tokjax.plan import move
from tokjax.reduce.reduction import Reduce
from tokjax.binding import bind
from tokjax.slots import Slots
from tokjax.reduce.site import Site
from tokjax.tokens import Kind
from tokjax.signals import asks
from tokjax.tokens import Tokens

__version__ = "0.1.0"

__all__ = [
  "Assignment",
  "Kind",
  "Mixture",
  "Plan",
  "Reduce",
  "Site",
  "Slots",
  "Tokens",
  "asks",
  "bind",
  "budgets",
  "matching",
  "move",
  "scores",
  "selection",
]
