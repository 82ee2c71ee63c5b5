"""The `cache` slot: what is remembered between decode steps."""

from tokjax.layer import Arrivals
from tokjax.slots import Attend
from tokjax.slots import Bytes
from tokjax.slots import Cache
from tokjax.layer import Layer
from tokjax.layer import Memory
from tokjax.slots import parameters

__all__ = [
  "Arrivals",
  "Attend",
  "Bytes",
  "Cache",
  "Layer",
  "Memory",
  "parameters",
]
