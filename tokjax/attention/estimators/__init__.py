"""Block estimators: how much attention each block of keys would receive.

Each is a pure function of one example,

    estimator(given: Blocked) -> [h, q blocks, k blocks]

of what `Blocked` holds. The result is the **logarithm of the estimated softmax
mass** of a block, up to a constant for every query block, in float32; -inf
where nothing can be seen. So one number serves every rule: top-k ranks it, and
`share` turns it into the shares that a mass or a threshold wants. An estimator
that looks at single pairs obeys the pattern there. Options of an estimator are
keyword arguments; fix them with `tokjax.reduce.reduction.bind`.
"""

from tokjax.attention.estimators.blocks import Blocked
from tokjax.attention.estimators.blocks import share
from tokjax.attention.estimators.pooled import bound
from tokjax.attention.estimators.pooled import landmark
from tokjax.attention.estimators.pooled import mean_pooled
from tokjax.attention.estimators.rows import antidiagonal
from tokjax.attention.estimators.rows import last_query
from tokjax.attention.estimators.rows import lse_cached
from tokjax.attention.estimators.rows import sampled

__all__ = [
  "Blocked",
  "antidiagonal",
  "bound",
  "landmark",
  "last_query",
  "lse_cached",
  "mean_pooled",
  "sampled",
  "share",
]
