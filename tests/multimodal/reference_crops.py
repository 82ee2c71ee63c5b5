"""Crops that share out what remains, slowly: one image, loops over tokens.

Written from the official code in its own terms, in float64 NumPy. HiRED:
hasanar1f/HiRED modeling_llava_next.py. GlobalCom2: xuyang-liu16/GlobalCom2
llava_arch.py. VFlowOpt: sihany077/VFlowOpt siglip_encoder.py and
llava_qwen_training_free.py.
"""

import math

import numpy as np


def best(scores, count):
  """Places of the largest scores, the largest first."""
  return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def crop_at(row, column, sides, crops):
  """Which crop a token of the whole image lies in, from 0 on."""
  (rows, columns), (high, wide) = sides, crops
  down = min(row // max(rows // high, 1), high - 1)
  right = min(column // max(columns // wide, 1), wide - 1)
  return down * wide + right


def hired(early, late, sides, crops, shown, rate, share, stripes):
  """Kept tokens, pairs of a crop and an index in it.

  Args:
    early, late: attention of the class token, `[crops + 1, n]`.
    sides: of the grid of a crop.
    crops: how many there are in rows and columns; (0, 0): none.
    shown: for each crop, indices that show the image.
    rate: fraction that remains.
    share: of it, for the whole image.
    stripes: as the official code counts.
  """
  n, many = len(early[0]), crops[0] * crops[1]
  total = int(rate * (n + sum(len(own) for own in shown)))
  whole = min(int(total * share), n) if many else total
  kept = [(0, i) for i in sorted(best(late[0], whole))]
  if not many:
    return kept
  rest = total - whole
  marks = [0] * many
  for i in best(early[0], int(n * (1 - share))):
    at = i * many // n
    if not stripes:
      at = crop_at(*divmod(i, sides[1]), sides, crops)
    marks[at] += 1
  for c, own in enumerate(shown):
    quota = int(np.float32(marks[c]) / np.float32(sum(marks)) * rest)
    ranked = best([late[c + 1][i] for i in own], quota)
    kept += [(c + 1, own[i]) for i in sorted(ranked)]
  return kept


def resized(values, size):
  """Bilinear, corners not aligned, as `torch.nn.functional.interpolate`."""
  out = np.zeros(size)
  for r in range(size[0]):
    for c in range(size[1]):
      y = max((r + 0.5) * values.shape[0] / size[0] - 0.5, 0)
      x = max((c + 0.5) * values.shape[1] / size[1] - 0.5, 0)
      for i, down in ((int(y), 1 - y % 1), (int(y) + 1, y % 1)):
        for j, right in ((int(x), 1 - x % 1), (int(x) + 1, x % 1)):
          i_, j_ = min(i, len(values) - 1), min(j, values.shape[1] - 1)
          out[r, c] += down * right * values[i_, j_]
  return out


def globalcom2(logits, sides, crops, shown, ratio, temperature):
  """Kept tokens, those of the whole image in descending order; see `hired`."""
  n, (rows, columns) = len(logits[0]), sides
  kept = [(0, i) for i in best(logits[0], int(n * ratio))]
  high, wide = crops
  if not high * wide:
    return kept
  sums = np.zeros(high * wide)
  for i, value in enumerate(logits[0]):
    sums[crop_at(*divmod(i, columns), sides, crops)] += value
  weight = np.exp((sums - sums.max()) / temperature)
  weight /= weight.sum() + 1e-8
  ratios = np.minimum(ratio * (1 + weight - weight.mean()), 1.0)
  place = [
    [
      (c // wide * rows + i // columns, c % wide * columns + i % columns)
      for i in own
    ]
    for c, own in enumerate(shown)
  ]
  every = np.array([p for own in place for p in own])
  low = every.min(axis=0)
  size = every.max(axis=0) - low + 1
  large = resized(np.reshape(logits[0], sides), size)
  for c, own in enumerate(shown):
    mine = np.array([logits[c + 1][i] for i in own])
    theirs = np.array([large[r - low[0], k - low[1]] for r, k in place[c]])
    both = mine / math.sqrt((mine**2).sum()) + theirs / math.sqrt(
      (theirs**2).sum()
    )
    count = int(len(own) * ratios[c])
    kept += [(c + 1, own[i]) for i in sorted(best(list(both), count))]
  return kept


def flow(attention, threshold):
  """Importance by the map `[h, n, n]` of one view of an image."""
  mean = np.mean(attention, axis=0)
  received = mean.mean(axis=0)
  much = np.flatnonzero(received > threshold * received.mean())
  much = much if len(much) else [int(np.argmax(received))]
  return mean[much].mean(axis=0)


def vflowopt(importance, sides, crops, shown, ratio, cell, room=None):
  """What is kept before the language model, and what each one is made of.

  Args:
    importance: `[crops + 1, n]`.
    sides, crops, shown: see `hired`.
    ratio: fraction that remains.
    cell: side of the cells.
    room: at most so many remain; None: any number.

  Returns:
    Pairs of a token and its weights of tokens; tokens are pairs of a crop and
    an index.
  """
  tokens = [(0, i) for i in range(len(importance[0]))]
  tokens += [(c + 1, i) for c, own in enumerate(shown) for i in own]
  score = {t: importance[t[0]][t[1]] for t in tokens}
  gone = round(len(tokens) * (1 - ratio))
  if shown:
    gone += int(len(tokens) / (cell * cell))
  ranked = sorted(tokens, key=lambda t: score[t])
  place = {}
  for c, i in tokens:
    row, column = divmod(i, sides[1])
    if c:
      row += (c - 1) // crops[1] * sides[0]
      column += (c - 1) % crops[1] * sides[1]
    place[c, i] = (row, column)
  local = [place[t] for t in tokens if t[0]]
  low = np.min(local, axis=0) if local else (0, 0)

  def cell_of(token):
    start = low if token[0] else (0, 0)
    at = (np.array(place[token]) - start) // cell
    return (token[0] > 0, *at)

  members = {}
  # The most important of a cell comes first.
  for token in ranked[:gone][::-1] if shown else []:
    members.setdefault(cell_of(token), []).append(token)
  if room is not None:
    # The least cells go; what is beyond the room joins those that there are.
    top = sorted(members, key=lambda at: -score[members[at][0]])[:room]
    members = {at: members[at] for at in top}
    over = max(len(tokens) - gone + len(members) - room, 0)
    for token in ranked[gone : gone + over]:
      if cell_of(token) in members:
        members[cell_of(token)].append(token)
    gone += over
  made = [(token, {token: 1.0}) for token in ranked[gone:]]
  for own in members.values():
    total = sum(score[t] for t in own)
    made.append((own[0], {t: score[t] / total for t in own}))
  return made


def lftr(x, places, significance, similarity, keep):
  """Tokens of images in a row that are alike, as their means, from a card.

  Args:
    x: tokens, `[n, d]`.
    places: of each, (image, place in it), in order.
    significance: of each.
    similarity: cosine from which tokens merge.
    keep: at most so many remain.
  """
  at, chains = {p: i for i, p in enumerate(places)}, {}
  for i, (image, place) in enumerate(places):
    before = at.get((image - 1, place))
    if before is not None:
      a, b = x[before], x[i]
      cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
      if cosine >= similarity:
        chains[i] = chains[before]
        chains[i].append(i)
        continue
    chains[i] = [i]
  firsts = [i for i in range(len(x)) if chains[i][0] == i]
  ranked = sorted(firsts, key=lambda i: -significance[i])[:keep]
  return np.array([x[chains[i]].mean(axis=0) for i in sorted(ranked)])
