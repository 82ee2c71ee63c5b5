"""Where GPU kernels run: on Hopper GPUs, or on a CPU in Pallas's simulator.

The simulator imitates copies and barriers. It is slow, meant for tests, and
needs JAX 0.11.2 or newer.
"""

import functools

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import aot
from pallas_kernels.walks import contract, gpu_plan, int32

_DTYPES = ("bfloat16", "float16")
# The simulator, which JAX before 0.11.2 has not.
_SIMULATOR = getattr(plgpu, "InterpretGPUParams", None)


def compiled(forward, backward, supports, **fields):
  """The implementation "gpu", for an H100 or H200.

  Args:
    forward, backward: functions of an implementation with an option
      `interpret`; backward may be None.
    supports: the reason against operands, whatever the machine.
    **fields: of `contract.Implementation`.
  """

  def supports_here(*call):
    return _wrong_machine() or supports(*call)

  return contract.Implementation(
    "gpu",
    int32.traced(forward),
    backward and int32.traced(backward),
    supports_here,
    platforms=("gpu",),
    **fields,
  )


@functools.cache
def simulated(forward, backward, supports, fields=(), **options):
  """The implementation "gpu_interpret".

  Args:
    forward, backward, supports: as in `compiled`.
    fields: pairs, the `fields` of `compiled`.
    **options: of `plgpu.InterpretGPUParams`, for example `detect_races=True`.
  """

  def simulate(fn):
    def call(*args, **kwargs):
      return fn(*args, **kwargs, interpret=_SIMULATOR(**options))

    return int32.traced(call)

  def supports_simulated(*call):
    if _SIMULATOR is None:
      return (
        f"JAX {jax.__version__} cannot simulate GPU kernels; 0.11.2 and newer "
        "can"
      )
    return supports(*call)

  return contract.Implementation(
    "gpu_interpret",
    simulate(forward),
    backward and simulate(backward),
    supports_simulated,
    **dict(fields),
  )


def implementations(forward, backward, supports, **fields):
  """Both, and the function that makes the simulated one of options."""
  interpreted = functools.partial(
    simulated, forward, backward, supports, tuple(fields.items())
  )
  both = compiled(forward, backward, supports, **fields), interpreted()
  return both, interpreted


def _wrong_machine():
  """Returns None, or why this machine cannot run the kernels."""
  platform = aot.platform()
  if platform != "gpu":
    return (
      f"the platform is {platform!r}, and the GPU kernels run on 'gpu'; "
      "implementation='gpu_interpret' simulates them elsewhere"
    )
  if jax.default_backend() == "gpu":
    chip = str(getattr(jax.local_devices()[0], "compute_capability", "none"))
    if chip != "9.0":
      return (
        f"the GPU has compute capability {chip}, the GPU kernels need 9.0 "
        "(Hopper: H100, H200)"
      )
  return None


def unsupported_arrays(
  q, v=None, most=gpu_plan.MAX_HEAD_SIZE, who="GPU kernels take"
):
  """Returns None, or why kernels cannot take these heads or numbers.

  Args:
    q, v: queries, and values if there are any.
    most: the largest head size.
    who: takes no larger one, for the message.
  """
  if str(q.dtype) not in _DTYPES:
    return f"q, k, v are {q.dtype}, the GPU kernels take {' or '.join(_DTYPES)}"
  for name, x in (("q and k", q), ("v", v)):
    if x is not None and x.shape[-1] > most:
      return f"{name} have head size {x.shape[-1]}, the {who} at most {most}"
  return None


def unsupported_blocks(layout):
  """Returns None, or why the kernels cannot take a layout's blocks."""
  for name in ("block_q", "block_k"):
    size = getattr(layout, name)
    if size % gpu_plan.ROWS:
      return (
        f"the layout's {name} is {size}, the GPU kernels need a multiple "
        f"of {gpu_plan.ROWS}"
      )
  return None
