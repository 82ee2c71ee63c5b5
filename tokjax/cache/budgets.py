"""Shim while the house is rebuilt."""
from tokjax.budgets import *
from tokjax.budgets import Count as Tokens
