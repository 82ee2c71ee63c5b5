"""Keys and values that a state-space model makes of chunks."""

import numpy as np

from tests.cache.cases import DEPTH, GROUPS, HEADS, STEPS, WIDTH
from tests.cache.reference.layer_input import GROUP, SCALE, rope, softmax

silu = lambda x: x / (1 + np.exp(-x))


def of_chunk(made, x):
  """The recurrence over one chunk, which starts from nothing."""
  hidden, state, heads = made["norm"].shape[0], 3, len(made["rate"])
  spread = lambda of_heads: np.repeat(of_heads, hidden // heads)
  kernel, outs, before = len(made["conv"]), [], []
  memory = np.zeros((hidden, state))
  for row in x:
    all_ = row @ made["in"]
    gate, mixed, step = all_[:hidden], all_[hidden:-heads], all_[-heads:]
    before.append(mixed)
    step = spread(np.log1p(np.exp(step)))
    taps = before[-kernel:]
    filters = made["conv"][kernel - len(taps) :]
    mixed = silu((np.array(taps) * filters).sum(axis=0))
    value = mixed[:hidden]
    write, read = mixed[hidden : hidden + state], mixed[hidden + state :]
    decay = np.exp(-np.exp(spread(made["rate"])) * step)
    memory = decay[:, None] * memory + np.outer(step * value, write)
    y = (memory @ read + spread(made["skip"]) * value) * silu(gate)
    y = y / np.sqrt((y * y).mean() + 1e-5) * made["norm"]
    outs.append(row + y @ made["out"])
  return np.stack(outs)


def attamba(s, chunk=2, lead=1):
  shift = min(chunk - 1, s.layer * (chunk // DEPTH))
  total = s.n + STEPS
  ends = {0} | {i for i in range(total) if (i + shift) % chunk == chunk - 1}
  made = {
    side: {k: np.asarray(x, np.float64) for k, x in p.items()}
    for side, p in s.params["attend"].items()
  }
  kept, first = {"k": [], "v": []}, 0
  for last in sorted(ends | {total - 1}):
    for side, rows in kept.items():
      rows.append(of_chunk(made[side], s.x[first : last + 1]))
    first = last + 1
  k, v = (np.concatenate(kept[side]).reshape(total, GROUPS, WIDTH)
          for side in "kv")  # fmt: skip
  k = np.stack([rope(k[i], i) for i in range(total)])

  def head(i, h):
    keys = [j for j in range(i + 1) if j in ends or j >= i - lead]
    w = softmax([SCALE * s.rq[i, h] @ k[j, h // GROUP] for j in keys])
    return w @ v[keys, h // GROUP]

  outs = np.stack(
    [np.stack([head(i, h) for h in range(HEADS)]) for i in range(total)]
  )
  return outs[: s.n], outs[s.n :]
