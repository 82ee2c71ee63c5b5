"""The `cache` slot: what is remembered between decode steps."""

from tokjax.cache.contract import Arrivals
from tokjax.cache.contract import Attend
from tokjax.cache.contract import Bytes
from tokjax.cache.contract import Cache
from tokjax.cache.contract import Layer
from tokjax.cache.contract import Memory
from tokjax.cache.contract import parameters

__all__ = [
  "Arrivals",
  "Attend",
  "Bytes",
  "Cache",
  "Layer",
  "Memory",
  "parameters",
]
