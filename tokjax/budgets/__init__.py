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
from tokjax.budgets.every_block import Capped
from tokjax.budgets.every_block import Constant
from tokjax.budgets.every_block import Even
from tokjax.budgets.every_block import Fixed
from tokjax.budgets.every_block import Linear
from tokjax.budgets.every_block import Removals
from tokjax.budgets.some_blocks import KeepTo
from tokjax.budgets.some_blocks import Ratio
from tokjax.budgets.some_blocks import Stages
from tokjax.budgets.one_block import AtEnd
from tokjax.budgets.one_block import Encoded
from tokjax.budgets.one_block import Once
from tokjax.budgets.one_block import Square
from tokjax.budgets.one_block import Undecided
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
