"""A recipe in a host, as the laws see it, whatever kind of model the host is.

Each program is compiled once and used by many laws.
"""

import abc
import dataclasses
import functools
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.slots import Slots

BATCH = 3
KEEP = 0.5
KEY = jax.random.key
_EVENT = "/jax/core/compile/backend_compile_duration"
_compiled: list[float] = []


def _count(event: str, duration: float, **_) -> None:
  if event == _EVENT:
    _compiled.append(duration)


jax.monitoring.register_event_duration_secs_listener(_count)


def compilations() -> int:
  """How many programs this process has compiled so far."""
  return len(_compiled)


def draw_params(shapes: Any) -> Any:
  """Random parameters by path, drawn without compiling an initialiser.

  Larger than at the start of training, so that attention is not uniform.
  """

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    if "scale" in name:
      return jnp.asarray(1 + 0.1 * noise)
    fan = np.prod(leaf.shape[:-1]) if "kernel" in name else 4.0
    return jnp.asarray(1.5 * noise / np.sqrt(fan, dtype=np.float32))

  return jax.tree_util.tree_map_with_path(draw, shapes)


@dataclasses.dataclass
class Case(abc.ABC):
  """The programs of one recipe in one host, and what they returned.

  Results are dicts of arrays with "output"; their leaves have the batch as
  leading axis.
  """

  recipe: str
  host: Any

  exact = True  # Whether keep=1.0 is the model itself bit for bit.

  @functools.cached_property
  def slots(self) -> Slots:
    return self.host.slots(self.recipe, KEEP)

  @functools.cached_property
  def model(self):
    return self.host.build(self.slots)

  @functools.cached_property
  def params(self) -> dict[str, Any]:
    return self.host.params(self.model)

  @functools.cached_property
  def inputs(self) -> Any:
    """A batch, of leaves with the batch as leading axis."""
    return self.host.inputs(BATCH)

  @property
  @abc.abstractmethod
  def output_shape(self) -> tuple[int, ...]:
    """The documented shape of "output"."""

  @property
  @abc.abstractmethod
  def takes_mask(self) -> bool:
    """Whether inputs may be padded."""

  @property
  @abc.abstractmethod
  def batch(self) -> Any:
    """The jitted program of a batch: (params, inputs, key) -> results."""

  @property
  @abc.abstractmethod
  def other_inputs(self) -> Any:
    """A second batch of the same shapes."""

  @property
  @abc.abstractmethod
  def nan_inputs(self) -> tuple[Any, Any]:
    """(params, inputs) of which example 1 becomes NaN."""

  @abc.abstractmethod
  def padded_and_alone(self) -> Iterator[tuple[dict, dict]]:
    """What is real of padded examples, and of the same ones unpadded."""

  @abc.abstractmethod
  def with_garbage(self) -> tuple[dict, dict]:
    """What is real of a padded batch, with two kinds of garbage as padding."""

  @abc.abstractmethod
  def keeping_all(self) -> tuple[dict, dict] | None:
    """Results at keep=1.0 and of the model itself; None: need not agree."""

  def run(self, inputs: Any, seed: int = 0, params: Any = None) -> dict:
    """Results of the batch program."""
    _ = self.clean  # Counts compilations, so it has to come first.
    params = self.params if params is None else params
    return jax.device_get(self.batch(params, inputs, KEY(seed)))

  @functools.cached_property
  def clean(self) -> dict[str, Any]:
    """Of `inputs`; counts the compilations of two calls on the way."""
    args = self.params, self.inputs, KEY(0)
    other = self.params, self.other_inputs, KEY(5)
    before = compilations()
    results = jax.block_until_ready(self.batch(*args))
    jax.block_until_ready(self.batch(*other))
    self.compiled = compilations() - before
    return jax.device_get(results)
