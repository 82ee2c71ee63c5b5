"""Block estimators: how much attention each block of keys would receive.

Each is a pure function of one example,

    estimator(q [h, m, d], k [g, n, d], *, block_q, block_k,
              bias=None, q_mask=None, k_mask=None, pattern=Full())
      -> [h, q blocks, k blocks]

with g dividing h (grouped-query heads). The result is the **logarithm of the
estimated softmax mass** of a block, up to a constant for every query block, in
float32; -inf where nothing can be seen. So one number serves every rule: top-k
ranks it, and `share` turns it into the shares that a mass or a threshold
wants. `bias` `[n]` is added to the logits of a key (log size: proportional
attention), tokens where a mask is False take no part, and `pattern` says who
may see whom; an estimator that looks at single pairs obeys it there.
Hand more options over with `tokjax.reduce.reduction.bind`.
"""

from tokjax.attention.estimators.blocks import share
from tokjax.attention.estimators.pooled import bound
from tokjax.attention.estimators.pooled import landmark
from tokjax.attention.estimators.pooled import mean_pooled
from tokjax.attention.estimators.rows import antidiagonal
from tokjax.attention.estimators.rows import last_query
from tokjax.attention.estimators.rows import lse_cached
from tokjax.attention.estimators.rows import sampled

__all__ = [
  "antidiagonal",
  "bound",
  "landmark",
  "last_query",
  "lse_cached",
  "mean_pooled",
  "sampled",
  "share",
]
