"""Builds the Mosaic GPU kernel that the three GPU passes share.

A thread block has `plan.warpgroups` compute warpgroups and one that only
starts copies (warp specialisation), which leaves them most of its registers.
"""

from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.walks import gpu_plan, gpu_stream

# Of 504 registers that a lane of each warpgroup has together.
_COMPUTE_REGISTERS, _MEMORY_REGISTERS = 240, 24


class Cell(NamedTuple):
  """What one compute warpgroup works on, and with.

  Attributes:
    plan, params: the static numbers.
    refs: references by name: inputs, outputs and scratch.
    rings: the `gpu_stream.Ring`s.
    at: `gpu_stream.Place` of the thread block; of a pair the first head.
    start, head: the warpgroup's own first resident token and query head.
    warpgroup: its number.
  """

  plan: Any
  params: Any
  refs: dict
  rings: list
  at: gpu_stream.Place
  start: Any
  head: Any
  warpgroup: Any

  @property
  def here(self):
    """The warpgroup's resident tokens."""
    return pl.ds(self.start, gpu_plan.ROWS)

  def own(self, name):
    """The warpgroup's part of a scratch reference, or None.

    Its address is computed where it is used. Otherwise the compiler keeps the
    descriptors of all resident factors, two registers for each 16 columns,
    throughout the loop, and spills.
    """
    if name not in self.refs:
      return None
    return self.refs[name].at[lax.optimization_barrier(self.warpgroup)]

  @property
  def result(self):
    """Where results of resident queries are put: in their place if they fit."""
    return self.own("q_rows" if self.plan.dv == self.plan.d else "out_rows")

  def row(self):
    """The lists."""
    return gpu_stream.Row(self.plan, self.refs["lists"], self.at)

  def turn_to(self, at):
    """The same keys for another query head."""
    return self._replace(at=at, head=at.head)

  def buffers(self, step):
    """What the rings hold for a step, by name."""
    return {
      name: buffer.at[step.slot]
      for ring in self.rings
      for name, buffer in ring.buffers.items()
    }


def cell(plan, params, refs, rings, warpgroup):
  """The `Cell` of this thread block and warpgroup."""
  at = gpu_stream.place(plan, lax.axis_index("cell"))
  start, head = at.start, at.head
  if plan.head_pairs:
    head = head + warpgroup
  else:
    start = start + warpgroup * gpu_plan.ROWS
  return Cell(plan, params, refs, rings, at, start, head, warpgroup)


def run(
  plan,
  params,
  name,
  memory,
  compute,
  inputs,
  rings,
  outputs,
  scratch,
  interpret,
):
  """Runs a kernel.

  Args:
    plan, params: the static numbers.
    name: of the kernel, for profiles and dumps.
    memory: `(refs, rings)`, what the copying warpgroup does.
    compute: `(cell)`, what each compute warpgroup does.
    inputs: `{name: array}` that are not streamed; "lists" are those of
      `lists.rows`.
    rings: `{name: gpu_stream.Source}` each.
    outputs: `{name: jax.ShapeDtypeStruct}`.
    scratch: `{name: shared memory or barrier}`.
    interpret: None or `plgpu.InterpretGPUParams`.

  Returns:
    The outputs, in order.
  """
  streamed = {name: x.array for ring in rings for name, x in ring.items()}
  arrays = inputs | streamed
  names = [*arrays, *outputs]
  buffers = [gpu_stream.Ring.scratch(plan, ring) for ring in rings]
  two = plan.warpgroups == 2

  def kernel(*refs):
    *refs, scratch, buffers = refs
    refs = dict(zip(names, refs, strict=True))
    built = [
      gpu_stream.Ring(plan, sources, refs, parts, interpret is not None)
      for sources, parts in zip(rings, buffers, strict=True)
    ]
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < plan.warpgroups)
    def _():
      if two:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
      compute(cell(plan, params, refs | scratch, built, warpgroup))

    @pl.when(warpgroup == plan.warpgroups)
    def _():
      if two:
        plgpu.set_max_registers(_MEMORY_REGISTERS, action="decrease")
      memory(refs, built)

  kernel.__name__ = name
  options = {} if interpret is None else {"interpret": interpret}
  call = plgpu.kernel(
    kernel,
    out_type=list(outputs.values()),
    scratch_types=[scratch, buffers],
    grid=(plan.cells,),
    grid_names=("cell",),
    num_threads=plan.warpgroups + 1,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    **options,
  )
  return call(*arrays.values())


def after(value, earlier, interpret):
  """`value`, in simulation not before `earlier` was computed.

  The interpreter has one memory, which two kernels at once would mix up.
  """
  if interpret is None:
    return value
  return jnp.where(jnp.isnan(earlier[(0,) * earlier.ndim]), jnp.nan, value)
