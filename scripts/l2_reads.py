"""How often the GPU's forward kernel reads keys and values from memory.

    python -m scripts.l2_reads

No GPU is needed: it goes through the lists in the order of the kernel's thread
blocks, one for each multiprocessor and all equally fast, and counts which tiles
are no longer in a second-level cache that forgets what was used longest ago. A
count, not a measurement: multiprocessors drift apart, and the real cache is two
halves. Columns: reads of a tile (64 KiB, keys and values of 128 tokens of size
128 in bfloat16) as multiples of the distinct ones, and the milliseconds that
they take at 4.3 TB/s, next to those of the products at 790 TFLOP/s.
"""

import collections
from collections.abc import Callable, Sequence

import numpy as np

MULTIPROCESSORS, BLOCK, TILE_BYTES = 132, 128, 64 * 2**10
# Of 50 MB, what keys and values have beside queries, results and lists.
CACHE_TILES = 40 * 2**20 // TILE_BYTES
MEMORY, MATRIX = 4.3e12, 790e12
HEADS, SHARE = 8, 4
Rows = list[Sequence[int]]


def reads(order: Sequence[tuple[int, int]], rows: Rows, cache: int) -> int:
  """Tiles that come from memory.

  Args:
    order: key head and row of each thread block, in order of their start.
    rows: key blocks that each row of query blocks lists.
    cache: tiles that the second-level cache holds.
  """
  waiting = iter(order)
  running = collections.deque()
  held: collections.OrderedDict = collections.OrderedDict()
  missed = 0

  def start():
    for head, row in waiting:
      if len(rows[row]):
        running.append((head, iter(rows[row])))
        return

  for _ in range(MULTIPROCESSORS):
    start()
  while running:
    head, blocks = running.popleft()
    block = next(blocks, None)
    if block is None:
      start()
      continue
    running.append((head, blocks))
    if (head, block) in held:
      held.move_to_end((head, block))
      continue
    missed += 1
    held[head, block] = None
    if len(held) > cache:
      held.popitem(last=False)
  return missed


def causal(length: int) -> Rows:
  """All earlier blocks."""
  return [range(row + 1) for row in range(length // BLOCK)]


def top(length: int, density: float, topics: int | None = None) -> Rows:
  """A share of all blocks at random; rows of a topic list the same."""
  n, rng = length // BLOCK, np.random.default_rng(0)
  pick = lambda: np.sort(rng.choice(n, int(n * density), replace=False))
  if topics is None:
    return [pick() for _ in range(n)]
  lists = [pick() for _ in range(topics)]
  return [lists[topic] for topic in rng.integers(topics, size=n)]


def in_rows(rows: Rows) -> list[int]:
  """The kernel's order: the last queries first."""
  return list(range(len(rows)))[::-1]


def by_list(rows: Rows) -> list[int]:
  """Rows with equal or similar lists next to each other."""
  return sorted(in_rows(rows), key=lambda row: tuple(rows[row]))


def launch(order: list[int], heads_inside: bool) -> list[tuple[int, int]]:
  """Thread blocks; query heads of a key head follow each other, or rows do."""
  heads = range(HEADS // SHARE)
  if heads_inside:
    return [(h, row) for h in heads for row in order for _ in range(SHARE)]
  return [(h, row) for h in heads for _ in range(SHARE) for row in order]


ORDERS: dict[str, Callable[[Rows], list[tuple[int, int]]]] = {
  "heads that share keys together (the kernel's)": lambda rows: launch(
    in_rows(rows), True
  ),
  "head by head": lambda rows: launch(in_rows(rows), False),
  "heads together, similar lists together": lambda rows: launch(
    by_list(rows), True
  ),
}


def main() -> None:
  """Prints the table."""
  for length in (32768, 131072, 262144):
    n = length // BLOCK
    for name, rows in {
      "causal": causal(length),
      "top-k 10 %": top(length, 0.1),
      "top-k 10 %, 16 topics": top(length, 0.1, 16),
    }.items():
      if name == "causal" and n > 1024:
        continue
      tiles = HEADS * sum(map(len, rows))
      distinct = HEADS // SHARE * len(set().union(*map(set, rows)))
      matrix = tiles * 4 * 128 * BLOCK**2 / MATRIX * 1e3
      for order, made in ORDERS.items():
        found = reads(made(rows), rows, CACHE_TILES)
        memory = found * TILE_BYTES / MEMORY * 1e3
        print(
          f"| {length} | {name} | {order} | {found / distinct:.1f} |"
          f" {memory:.2f} | {matrix:.2f} |",
          flush=True,
        )


if __name__ == "__main__":
  main()
