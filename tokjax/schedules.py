"""Shim while the house is rebuilt."""
from tokjax.budgets import *
from tokjax.budgets import Budget as Schedule
from tokjax.budgets import BudgetError as ScheduleError
from tokjax.budgets import exact as _exact
from tokjax.budgets.base import *
from tokjax.reduce.stages import check
