"""Methods that store in few bits, in few features, or with other layers."""

import jax
import numpy as np

from tests.cache.cases import GROUPS, HEADS, STEPS, WIDTH
from tests.cache.reference.layer_input import GROUP, SCALE, best, rope, softmax
from tests.cache.reference.rules import full


def coarse(x, bits, dtype=np.float32):
  """A group through codes of that many bits."""
  x = np.asarray(x, dtype)
  low, step = x.min(), (x.max() - x.min()) / dtype(2**bits - 1)
  if step == 0:
    return x
  return np.round((x - low) / step) * step + low


def kivi(s, bits=2, group=4, residual=8):
  """Two lists each, coded and exact; a step attends before it codes."""
  k, v = np.array(s.rk, np.float32), np.array(s.v, np.float32)

  def coarse_keys(rows):
    """Groups of tokens, channel by channel."""
    out = np.array(rows)
    for a in range(0, len(rows), group):
      for g in range(GROUPS):
        for c in range(WIDTH):
          out[a : a + group, g, c] = coarse(out[a : a + group, g, c], bits)
    return list(out)

  def coarse_values(row):
    """Groups of channels of one token."""
    out = np.array(row)
    for g in range(GROUPS):
      for a in range(0, WIDTH, group):
        out[g, a : a + group] = coarse(out[g, a : a + group], bits)
    return out

  cut = s.n - s.n % residual
  keys_coded, keys_exact = coarse_keys(k[:cut]), list(k[cut : s.n])
  old = max(s.n - residual, 0)
  values_coded = [coarse_values(row) for row in v[:old]]
  values_exact = list(v[old : s.n])
  outs = []
  for i in range(s.n, s.n + STEPS):
    keys_exact.append(k[i])
    values_exact.append(v[i])
    keys = np.stack(keys_coded + keys_exact)
    values = np.stack(values_coded + values_exact)
    out = []
    for h in range(HEADS):
      w = softmax(SCALE * keys[:, h // GROUP] @ s.rq[i, h])
      out.append(w @ values[:, h // GROUP])
    outs.append(np.stack(out))
    if len(keys_exact) == residual:
      keys_coded += coarse_keys(keys_exact)
      keys_exact = []
    if len(values_exact) > residual:
      values_coded.append(coarse_values(values_exact.pop(0)))
  return s.prompt(), np.stack(outs)


def zipcache(s, bits=(4, 2), plain=0.5, gap=4):
  """Rows are replaced by what their codes say, one batch after the other."""
  n = s.n
  k, v = np.array(s.rk, np.float32), np.array(s.v, np.float32)
  late = -(-n // 20)
  key = jax.random.fold_in(jax.random.key(0), s.layer)
  noise = [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(n)]
  probes = best(noise[: n - late], n // 20) + list(range(n - late, n))
  score = np.zeros((GROUPS, n))
  for h in range(HEADS):
    for i in probes:
      score[h // GROUP, : i + 1] += s.weights(h, i, range(i + 1))
  score /= [max(sum(i >= j for i in probes), 1) for j in range(n)]

  def code(batch, score):
    few = int(plain * len(batch))
    for g in range(GROUPS):
      good = best(score[g], len(batch) - few)
      scale = np.sqrt(np.abs(v[batch, g]).max(axis=0))
      for some, b in (
        (good, bits[0]),
        (sorted({*range(len(batch))} - {*good}), bits[1]),
      ):
        rows = [batch[j] for j in some]
        for c in range(WIDTH):
          k[rows, g, c] = coarse(k[rows, g, c], b)
        for row in rows:
          v[row, g] = coarse(v[row, g] / scale, b) * scale

  code(list(range(n)), score)
  outs, buffer = [], []
  for t in range(STEPS):
    i = n + t
    buffer.append(i)
    out, row = [], np.zeros((GROUPS, i + 1))
    for h in range(HEADS):
      g = h // GROUP
      w = softmax([SCALE * s.rq[i, h] @ k[j, g] for j in range(i + 1)])
      row[g] += w
      out.append(w @ v[: i + 1, g])
    outs.append(np.stack(out))
    if len(buffer) == gap:
      code(buffer, row[:, -gap:])
      buffer = []
  return s.prompt(), np.stack(outs)


def vidkv(s, bits=1.5, group=4, buffer=4):
  """All heads' channels are chosen together; a full buffer codes everything."""
  k, v = np.array(s.rk, np.float32), np.array(s.v, np.float32)

  def code(count):
    rows = k[:count].reshape(-1, WIDTH)
    size = rows.max(axis=0) - rows.min(axis=0)
    varying = sorted(best(size, int(WIDTH * (bits - 1))))
    others = [c for c in range(WIDTH) if c not in varying]
    for g in range(GROUPS):
      for a in range(0, count, group):
        tokens = slice(a, a + group)
        for c in varying:
          k[tokens, g, c] = coarse(k[tokens, g, c], 2)
        spectrum = np.fft.fft(k[tokens, g][:, others], axis=1)
        parts = []
        for x in (spectrum.real, spectrum.imag):
          parts.append(np.where(x >= 0, 1, -1) * np.abs(x).mean(axis=0))
        back = np.fft.ifft(parts[0] + 1j * parts[1], axis=1).real
        for i, c in enumerate(others):
          k[tokens, g, c] = back[:, i]
        for c in range(WIDTH):
          x = v[tokens, g, c]
          scale = np.abs(x).mean()
          v[tokens, g, c] = np.sign(x) * (np.abs(x) > scale / 2) * scale

  coded = s.n // group * group
  if coded:
    code(coded)
  outs = []
  for i in range(s.n, s.n + STEPS):
    out = []
    for h in range(HEADS):
      g = h // GROUP
      w = softmax([SCALE * s.rq[i, h] @ k[j, g] for j in range(i + 1)])
      out.append(w @ v[: i + 1, g])
    outs.append(np.stack(out))
    if i + 1 - coded == buffer:
      coded = i + 1
      code(coded)
  return s.prompt(), np.stack(outs)


def cskv(s, window=4):
  """Two lists: features of full windows, exact rows of the one being filled."""
  made = {
    name: {k: np.asarray(x, np.float64) for k, x in part.items()}
    for name, part in s.params["cache"].items()
  }
  low = lambda name: (s.x @ made[name]["down"] @ made[name]["up"]).reshape(
    -1, GROUPS, WIDTH
  )
  k, v = low("k"), low("v")
  full = list(range(s.n // window * window))
  filling = list(range(len(full), s.n))
  outs = []
  for i in range(s.n, s.n + STEPS):
    filling.append(i)
    out = []
    for h in range(HEADS):
      g = h // GROUP
      keys = [rope(k[j, g], j) for j in full] + [s.rk[j, g] for j in filling]
      values = [v[j, g] for j in full] + [s.v[j, g] for j in filling]
      w = softmax([SCALE * s.rq[i, h] @ key for key in keys])
      out.append(w @ np.stack(values))
    outs.append(np.stack(out))
    if len(filling) == window:
      full, filling = full + filling, []
  return s.prompt(), np.stack(outs)


def pod(s, first=2, recent=5, threshold=0.7):
  """Key head 0 of layer 1 follows layer 0; the other leads itself."""
  if s.layer == 0:
    s.shared["lead"] = s
    return full(s)
  lead = s.shared["lead"]
  outs = []
  for i in range(s.n + STEPS):
    out = []
    for h in range(HEADS):
      if h // GROUP == 1:
        out.append(s.head(h, i, range(i + 1)))
        continue
      far = [j >= first and i - j >= recent for j in range(i + 1)]
      logits = [
        (lead if far[j] else s).rq[i, h] @ (lead if far[j] else s).rk[j, 0]
        for j in range(i + 1)
      ]
      e = np.exp(SCALE * np.array(logits))
      near = e * ~np.array(far)
      gate = near.sum() / e.sum()
      w = near / near.sum() if gate >= threshold else e / e.sum()
      out.append(w @ s.v[: i + 1, 0])
    outs.append(np.stack(out))
  return np.stack(outs[: s.n]), np.stack(outs[s.n :])
