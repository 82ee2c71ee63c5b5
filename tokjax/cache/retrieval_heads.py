"""Which heads retrieve: the offline choice of RazorAttention.

Random tokens repeated several times are shown to the model; heads that look
back at an earlier copy of the token (echo), or at what followed it (induction),
need the whole cache. From the paper's text (arXiv 2407.15891).
"""

import math

import numpy as np


def echo_and_induction(
  attention: np.ndarray, period: int
) -> tuple[np.ndarray, np.ndarray]:
  """Mean attention to earlier copies, and to the tokens after them.

  Args:
    attention: of a text of `period` tokens repeated, `[..., n, n]`.
    period: length of what is repeated.

  Returns:
    Echo and induction scores, `[...]`, over the queries after the first copy.
  """
  n = attention.shape[-1]
  if n < 2 * period:
    raise ValueError(
      f"attention of {n} tokens holds no second copy of period={period}; show"
      " the text at least twice"
    )
  query, key = np.arange(n)[:, None], np.arange(n)[None]
  back = query - key
  copies = (back > 0) & (back % period == 0)
  follow = (back > 0) & ((back + 1) % period == 0) & (back >= period - 1)
  late = slice(period, None)
  score = lambda mask: (attention * mask)[..., late, :].sum(-1).mean(-1)
  return score(copies), score(follow)


def retrieval_heads(
  echo: np.ndarray,
  induction: np.ndarray,
  kv_heads: int,
  *,
  by_induction: float = 0.14,
  by_echo: float = 0.01,
) -> tuple[tuple[int, ...], ...]:
  """Key heads that keep everything, for each layer.

  Args:
    echo, induction: of all query heads, `[layers, H]`.
    kv_heads: a key head is chosen if one of its query heads is.
    by_induction, by_echo: share of all heads that is chosen by either score,
      rounded up.
  """
  chosen = np.zeros(echo.shape, bool)
  for score, share in ((induction, by_induction), (echo, by_echo)):
    count = math.ceil(share * score.size)
    best = np.argsort(-score, axis=None, kind="stable")[:count]
    chosen.reshape(-1)[best] = True
  groups = np.any(chosen.reshape(len(chosen), kv_heads, -1), axis=-1)
  return tuple(tuple(np.flatnonzero(row).tolist()) for row in groups)
