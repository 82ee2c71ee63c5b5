"""Stage c: FlexAttention over the same lists, where PyTorch is installed.

In a process of its own, and with JAX on the CPU: both want the device's memory.
"""

import functools

import jax

from bench import flex
from bench.clock import Unavailable
from pallas_kernels import layout as layouts
from scripts.report import sparse
from scripts.report.jobs import Here, Job


def jobs(here: Here) -> list[Job]:
  """Head size 128 at a tenth of the blocks and at all of them, 32k tokens."""
  setting = sparse.Setting("32k", 32768, here.kernel)
  if here.tiny:
    setting = setting.shrunk()

  def run(kind, direction):
    if here.platform != "gpu":
      raise Unavailable("FlexAttention is timed on a GPU")
    with jax.default_device(jax.devices("cpu")[0]):
      layout = layouts.with_lead(sparse.layout_of(setting, kind), (1,))
      inputs = setting.inputs()
      candidate = flex.candidate(layout, inputs, direction, on_cpu=False)
    return here.timed(
      candidate, flops=setting.flops(candidate.density, direction),
      density=candidate.density, against=f"32k {kind} {direction}",
    )  # fmt: skip

  return [
    Job(f"32k flex {kind} {direction}", functools.partial(run, kind, direction))
    for kind in ("top-k", "full")
    for direction in sparse.DIRECTIONS
  ]
