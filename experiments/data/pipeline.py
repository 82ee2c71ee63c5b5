"""Any data set to batches: deterministic, sharded by index, resumable.

A data set is a small frozen object with `source(split)` (random access to raw
examples), `augment(element, rng)` for training and `prepare(element)` for
evaluation. Everything else happens here, once.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

Batch = dict[str, np.ndarray]


@functools.lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> np.ndarray:
  """The places of `count` examples in an epoch; eight bytes each."""
  return np.random.default_rng((seed, epoch)).permutation(count)


@dataclasses.dataclass(frozen=True)
class Shuffled:
  """This host's rows of every global batch, by its number, without end.

  A random-access source of whole batches: on a CPU, grain's own work for each
  example takes longer than that of a small data set.

  The batch is cut into consecutive parts, so that the hosts' parts put
  together are the batch one host alone would read, in the same order. Every
  epoch has its own order, and every example in it its own random numbers; a
  batch may hold the end of one and the start of the next.

  Attributes:
    data: the data set.
    examples: its raw training examples.
    batch_size: of all hosts together.
    seed: of order and augmentation.
    host, hosts: number of this one, and how many there are.
  """

  data: Any
  examples: Any
  batch_size: int
  seed: int
  host: int
  hosts: int

  def __len__(self) -> int:
    return sys.maxsize // self.batch_size

  def __getitem__(self, batch) -> Batch:
    rows = self.batch_size // self.hosts
    first = int(batch) * self.batch_size + self.host * rows
    return stack([self._example(first + row) for row in range(rows)])

  def _example(self, place: int) -> dict[str, Any]:
    epoch, i = divmod(place, len(self.examples))
    index = order(self.seed, epoch, len(self.examples))[i]
    key = np.array([self.seed, place], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    return self.data.augment(self.examples[int(index)], rng)


def train_batches(
  config: Any, *, to_device: Callable[[Batch], Any] | None = None
) -> grain.DatasetIterator:
  """Endless shuffled batches of this host; the position can be saved.

  Args:
    config: a `Config`: data, batch_size, seed, threads, processes.
    to_device: moves a batch to the devices, ahead of its use.
  """
  data, batch_size = config.data, config.batch_size
  hosts = jax.process_count()
  if batch_size % hosts:
    raise ValueError(
      f"batch_size={batch_size}: must be a multiple of the {hosts} hosts"
    )
  examples = data.source("train")
  if len(examples) < batch_size:
    raise ValueError(
      f"batch_size={batch_size}: the data set has {len(examples)} examples"
    )
  source = Shuffled(
    data, examples, batch_size, config.seed, jax.process_index(), hosts
  )
  options = grain.ReadOptions(
    num_threads=config.threads, prefetch_buffer_size=4
  )
  batches = grain.MapDataset.source(source).to_iter_dataset(options)
  if config.processes:
    workers = grain.MultiprocessingOptions(config.processes)
    batches = batches.mp_prefetch(workers)
  if to_device is not None:
    batches = batches.map(to_device)
    batches = grain.experimental.ThreadPrefetchIterDataset(
      batches, prefetch_buffer_size=2
    )
  return iter(batches)


def heldout_batches(
  data: Any, batch_size: int, threads: int = 4
) -> Iterator[Batch]:
  """This host's share of the held-out split, once, in order.

  The last batch is filled up; `"weight"` is 1 for real rows and 0 for the
  others, so that every batch has one shape.
  """
  source = data.source("test")
  hosts, rows = jax.process_count(), batch_size // jax.process_count()
  rounds = -(-len(source) // batch_size)

  def row(i: int) -> dict[str, Any]:
    index = i * hosts + jax.process_index()
    real = index < len(source)
    element = data.prepare(source[index if real else 0])
    return {**element, "weight": np.float32(real)}

  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)
  examples = grain.MapDataset.range(rounds * rows).map(row).batch(rows)
  batches = iter(examples.to_iter_dataset(options))
  yield from batches
  batches.close()


def heldout_arrays(data: Any, limit: int | None = None) -> Batch:
  """The held-out split as arrays, `limit` examples at most."""
  source = data.source("test")
  count = len(source) if limit is None else min(limit, len(source))
  return stack([data.prepare(source[i]) for i in range(count)])


def stack(elements: list[dict[str, Any]]) -> Batch:
  """Examples as one batch: every entry gets a leading axis."""
  keys = elements[0]
  return {k: np.stack([np.asarray(e[k]) for e in elements]) for k in keys}
