"""How many tokens remain, and where: always static integers.

A `Budget` maps a number of tokens and a layer to a number of tokens that
remain. Models, prompts, caches and windows of attention take the same ones.
`with_keep(keep)` gives the budget of the same shape that ends with that
fraction of the tokens, which is what a sweep turns.
"""

from tokjax.budgets.base import NOTHING
from tokjax.budgets.base import Budget
from tokjax.budgets.base import BudgetError
from tokjax.budgets.base import Counts
from tokjax.budgets.base import block
from tokjax.budgets.base import check_count
from tokjax.budgets.base import check_keep
from tokjax.budgets.base import exact
from tokjax.budgets.base import stages
from tokjax.budgets.base import table
from tokjax.budgets.by_depth import AtEnd
from tokjax.budgets.by_depth import Capped
from tokjax.budgets.by_depth import Constant
from tokjax.budgets.by_depth import Encoded
from tokjax.budgets.by_depth import Even
from tokjax.budgets.by_depth import Fixed
from tokjax.budgets.by_depth import KeepTo
from tokjax.budgets.by_depth import Linear
from tokjax.budgets.by_depth import Once
from tokjax.budgets.by_depth import Ratio
from tokjax.budgets.by_depth import Removals
from tokjax.budgets.by_depth import Square
from tokjax.budgets.by_depth import Stages
from tokjax.budgets.by_depth import Undecided
from tokjax.budgets.by_length import Always
from tokjax.budgets.by_length import Beyond
from tokjax.budgets.by_length import Count
from tokjax.budgets.by_length import Larger
from tokjax.budgets.by_length import Multiple
from tokjax.budgets.by_length import Pyramid
from tokjax.budgets.by_length import Rest
from tokjax.budgets.by_length import Share
from tokjax.budgets.by_length import Sum
from tokjax.budgets.by_length import counts
from tokjax.budgets.by_length import fixed
from tokjax.budgets.by_length import of
from tokjax.budgets.gradual import EveryOther
from tokjax.budgets.gradual import Ramp
from tokjax.budgets.recycling import Recycled
