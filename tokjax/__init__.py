"""tokjax: token merging, pruning and sparse attention as pure transforms."""

from tokjax import matching
from tokjax import schedules
from tokjax import scores
from tokjax import selection
from tokjax.plan import Assignment
from tokjax.plan import Mixture
from tokjax.plan import Plan
from tokjax.plan import move
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.reduction import Slots
from tokjax.reduce.reduction import bind
from tokjax.reduce.site import Site
from tokjax.tokens import Kind
from tokjax.tokens import Signals
from tokjax.tokens import Tokens

__version__ = "0.1.0"

__all__ = [
  "Assignment",
  "Kind",
  "Mixture",
  "Plan",
  "Reduce",
  "Signals",
  "Site",
  "Slots",
  "Tokens",
  "bind",
  "matching",
  "move",
  "schedules",
  "scores",
  "selection",
]
