"""Where the time goes between two log lines."""

import contextlib
import dataclasses
import time
from typing import Any

import jax

from experiments.training.config import Config
from tokjax.analysis import cost


@dataclasses.dataclass
class Meter:
  """Rates since the last reading.

  Attributes:
    unit: what is counted, "images" or "tokens".
    per_step: how many of them a step processes.
    flops: of one step on one device, by the compiler.
    peak: FLOP/s that the device can do; None: unknown.
    peak_bytes: memory of the step by the compiler.
  """

  unit: str
  per_step: int
  flops: float
  peak: float | None
  peak_bytes: int
  _steps: int = 0
  _waited: float = 0.0
  _away: float = 0.0
  _since: float = dataclasses.field(default_factory=time.perf_counter)

  @classmethod
  def of(cls, config: Config, compiled: Any) -> "Meter":
    """For a compiled step."""
    meter = cls(
      unit=config.task.unit,
      per_step=config.batch_size * config.task.units(config.data),
      flops=0.0,
      peak=cost.peak_flops(jax.devices()[0].device_kind),
      peak_bytes=0,
    )
    meter.runs(compiled)
    return meter

  def runs(self, compiled: Any) -> None:
    """Counts the FLOPs and memory of this compiled step from now on."""
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    self.flops, self.peak_bytes = compiled.cost_analysis()["flops"], used

  @contextlib.contextmanager
  def waiting(self):
    """Around the wait for one step's data."""
    begin = time.perf_counter()
    yield
    self._waited += time.perf_counter() - begin
    self._steps += 1

  @contextlib.contextmanager
  def away(self):
    """Around what is not training."""
    begin = time.perf_counter()
    yield
    self._away += time.perf_counter() - begin

  def read(self) -> dict[str, float]:
    """Rates since the last call; `wait` is the share spent without data."""
    now = time.perf_counter()
    spent = max(now - self._since - self._away, 1e-9)
    a_step = spent / max(self._steps, 1)
    stats = jax.local_devices()[0].memory_stats() or {}
    out = {
      f"{self.unit}_per_second": self.per_step / a_step,
      "step_seconds": a_step,
      "wait": self._waited / spent,
      "gflops_per_step": self.flops / 1e9,
      "tflops_per_second": self.flops / a_step / 1e12,
      "peak_memory_mib": stats.get("peak_bytes_in_use", self.peak_bytes)
      / 2**20,
    }
    if self.peak is not None:
      out["mfu"] = self.flops / a_step / self.peak
    self._steps, self._waited, self._away, self._since = 0, 0.0, 0.0, now
    return out
