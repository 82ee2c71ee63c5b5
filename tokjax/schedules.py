"""Shim while the house is rebuilt."""
from tokjax.budgets import *
from tokjax.budgets import Budget as Schedule, BudgetError as ScheduleError, exact as _exact
from tokjax.budgets.base import *
from tokjax.reduce.stages import check
