"""Stage b: what products and copies reach on this machine."""

import jax.numpy as jnp

from bench import limits
from scripts.report import tables
from scripts.report.jobs import Here, Job


def jobs(here: Here) -> list[Job]:
  """Products of every dtype that models use, and a copy."""

  def product(dtype):
    call, flops = limits.product(
      jnp.dtype(dtype), 128 if here.tiny else None
    )
    return here.timed(call, flops=flops)

  def copy():
    call, moved = limits.copy(1 << 16 if here.tiny else None)
    return here.timed(call, bytes=moved)

  return [
    Job(tables.PEAK, lambda: product("bfloat16")),
    Job("copy", copy),
    Job("product float16", lambda: product("float16")),
    Job("product float32", lambda: product("float32")),
  ]
