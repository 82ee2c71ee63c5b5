"""Any data set to batches: deterministic, sharded by index, resumable.

A data set is a small frozen object with `source(split)` (random access to raw
examples), `augment(element, rng)` for training and `prepare(element)` for
evaluation. Everything else happens here, once.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

Batch = dict[str, np.ndarray]


class HostRows(grain.MapDataset):
  """This host's rows of every global batch.

  The batch is cut into consecutive parts, so that the hosts' parts put
  together are the batch one host alone would read, in the same order.
  """

  def __init__(self, parent, batch_size: int, host: int, hosts: int):
    super().__init__(parent)
    self._rows = batch_size // hosts
    self._batch_size = batch_size
    self._host = host

  def __len__(self) -> int:
    return len(self._parent) // self._batch_size * self._rows

  def __getitem__(self, index):
    batch, row = divmod(index, self._rows)
    return self._parent[
      batch * self._batch_size + self._host * self._rows + row
    ]


@dataclasses.dataclass(frozen=True)
class Augment(grain.transforms.RandomMap):
  """`data.augment` as grain wants it."""

  data: Any

  def random_map(self, element, rng: np.random.Generator):
    return self.data.augment(element, rng)


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
  examples = grain.MapDataset.source(data.source("train")).seed(config.seed)
  if len(examples) < batch_size:
    raise ValueError(
      f"batch_size={batch_size}: the data set has {len(examples)} examples"
    )
  examples = examples.shuffle().repeat().random_map(Augment(data))
  rows = HostRows(examples, batch_size, jax.process_index(), hosts)
  options = grain.ReadOptions(
    num_threads=config.threads, prefetch_buffer_size=4
  )
  batches = rows.batch(batch_size // hosts).to_iter_dataset(options)
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
