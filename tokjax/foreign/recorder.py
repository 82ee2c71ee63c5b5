"""An attention function that shows what it was given."""

import inspect
from collections.abc import Callable
from typing import Any

from jaxtyping import Array


class Recorder:
  """An attention function that adds a bias and keeps what it was given.

  For one call of one block: what it keeps belongs to the trace of that block.

  Attributes:
    qkv: queries, keys and values of its call.
  """

  def __init__(self, function: Callable[..., Array], bias: Array | None):
    self.function, self.bias = function, bias
    self._qkv: tuple[Array, Array, Array] | None = None
    # Linen passes on what the signature names.
    self.__signature__ = inspect.signature(function)

  def __call__(self, query, key, value, bias=None, **options: Any) -> Array:
    self._qkv = (query, key, value)
    if self.bias is not None:
      bias = self.bias if bias is None else bias + self.bias
    return self.function(query, key, value, bias=bias, **options)

  @property
  def qkv(self) -> tuple[Array, Array, Array]:
    if self._qkv is None:
      raise ValueError(
        "the attention function has not been called: give it to the attention"
        " module of the block, and call that first"
      )
    return self._qkv
