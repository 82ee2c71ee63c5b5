"""What a stage is made of, and how a worker times it."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax

from bench import clock
from pallas_kernels import choice

# What runs on a platform; on others there is no kernel of ours.
_KERNELS = {"gpu": "gpu", "tpu": "tpu"}


@dataclasses.dataclass(frozen=True)
class Job:
  """One row of the report.

  Attributes:
    name: unique in the whole report.
    run: returns the row's fields, which JSON can hold. Known ones (see
      `tables`): `seconds`, `flops`, `bytes`, `against` (the name of the job
      that the time is compared with), `right` (of a check).
    rests_on: names of checks; a job is skipped if one of them went wrong.
  """

  name: str
  run: Callable[[], dict[str, Any]]
  rests_on: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Here:
  """The machine that a worker runs on.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
    tiny: whether sizes are small and times mean nothing, as on a CPU.
  """

  platform: str
  tiny: bool

  @classmethod
  def found(cls) -> "Here":
    platform = jax.default_backend()
    return cls(platform, tiny=platform == "cpu")

  @property
  def kernel(self) -> str:
    """The implementation that is measured; there is no silent other one."""
    return _KERNELS.get(self.platform, "xla")

  def implementations(self, operation: str) -> list[str]:
    """Those of an operation that this platform has, the best first."""
    known = choice.implementations(f"pallas_kernels.{operation}")
    return [n for n, one in known.items() if self.platform in one.platforms]

  def timed(self, candidate: clock.Timed, **fields: Any) -> dict[str, Any]:
    """The fields of a timed job: the median round, and the extremes."""
    clock.seconds(candidate, 1)  # It may have to be compiled first.
    slow = not self.tiny and clock.seconds(candidate, 1) > 0.5
    rounds, at_least = (2, 0.0) if self.tiny else (3 if slow else 7, 0.35)
    (found,) = clock.in_turns([candidate], rounds, at_least)
    middle = statistics.median(found)
    return {
      "seconds": middle, "fastest": min(found), "slowest": max(found), **fields
    }  # fmt: skip
