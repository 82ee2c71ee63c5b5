"""GPUs to compile for down to machine code (SASS), on a machine without one.

Needs the CUDA plugin of JAX and NVIDIA's assembler, but no GPU and no driver:
`pip install 'tokjax[gpuaot]'`. The process must not start on a GPU backend:
set `JAX_PLATFORMS=cpu` (without it JAX asks a CUDA client that is not there).

`report` compiles in a process of its own, where the compiler writes down the
assembler's messages (registers, spills), PTX and machine code.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

from jax.experimental import topologies

# What the compiler must know of a GPU: its limits. Measured rates, which only
# matter to XLA's own fusions, are left out.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} device_address_bits: 64
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  device_vendor: "NVIDIA Corporation" name: "{name}"
  platform_version: "Compute Capability 9.0a"
  driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
TARGETS = {
  "h100": _HOPPER.format(
    bandwidth=3352000000000, memory=85027979264, name="NVIDIA H100 80GB HBM3"
  ),
  "h200": _HOPPER.format(
    bandwidth=4800000000000, memory=151397597184, name="NVIDIA H200"
  ),
}
# The assembler, and the disassembler (optional).
_PROGRAMS = ("ptxas", "nvdisasm")


class Kernel(NamedTuple):
  """What the assembler says of one kernel.

  Attributes:
    name: of the kernel, as it was given to Pallas.
    registers: per thread at launch.
    spilled: bytes per thread that are stored to local memory for want of
      registers.
    shared_memory: bytes per thread block.
    warnings: of the assembler, such as serialised matrix products.
    ptx: the kernel in PTX.
    sass: its machine code, or empty where nvdisasm is not installed.
  """

  name: str
  registers: int
  spilled: int
  shared_memory: int
  warnings: tuple
  ptx: str
  sass: str

  def count(self, instruction):
    """How often an instruction (a regular expression) stands in the PTX."""
    return len(re.findall(instruction, self.ptx))


_INSTRUCTION = re.compile(
  r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*(?P<name>[A-Zx0-9_.]+)\s*(?P<rest>.*)"
)


def hazards(sass):
  """Instructions that use registers of a matrix product still under way.

  Until the program waits for them (`WARPGROUP.DEPBAR`), products write their
  sums at any time, and read left factors that are in registers: nothing may
  use the former or write the latter. Neither interpreter nor assembler checks
  that.

  Args:
    sass: machine code of a kernel, with control codes or without.

  Returns:
    The lines, in order of the code: loops are read once.
  """
  under_way, found = [], []
  for line in sass.splitlines():
    match = _INSTRUCTION.search(line)
    if match is None:
      continue
    name, rest = match["name"], match["rest"]
    if name.startswith("HGMMA"):
      product = _registers(name, rest)
      if under_way and under_way[-1][0] == product[0]:
        product = (product[0], product[1] | under_way.pop()[1])
      under_way.append(product)
    elif name.startswith("WARPGROUP.DEPBAR"):
      left = int(rest.split()[1], 16)
      under_way = under_way[len(under_way) - left :] if left else []
    else:
      used = [int(x) for x in re.findall(r"\bR(\d+)\b", rest)]
      written = set(used[:1]) if rest.startswith("R") else set()
      if any(set(used) & sums or written & read for sums, read in under_way):
        found.append(line.strip())
  return found


def _registers(name, rest):
  """What a matrix product writes, and what it reads as its left factor."""
  operands = [x.strip() for x in rest.split(",")]
  start = int(operands[0][1:])
  columns = int(name.split(".")[1].split("x")[1])
  sums = frozenset(range(start, start + columns // 2))
  left = re.fullmatch(r"R(\d+)", operands[1])
  read = range(int(left[1]), int(left[1]) + 4) if left else ()
  return sums, frozenset(read)


def missing():
  """Returns None, or why programs cannot be compiled for GPU here."""
  for name in ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"):
    if _installed(name):
      break
  else:
    return (
      "JAX's CUDA plugin is not installed; `pip install 'tokjax[gpuaot]'` "
      "brings the GPU compiler, which needs no GPU"
    )
  if not _program("ptxas"):
    return (
      "ptxas is not installed; `pip install nvidia-cuda-nvcc` brings it, and "
      "needs no GPU"
    )
  return None


def _installed(name):
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:
    return False


def _program(name):
  """Path of one of NVIDIA's programs, or an empty string."""
  found = importlib.util.find_spec("nvidia")
  roots = found.submodule_search_locations if found else None
  for root in roots or ():
    for folder in sorted(os.listdir(root)):
      path = os.path.join(root, folder, "bin", name)
      if os.path.exists(path):
        return path
  return shutil.which(name) or ""


def device(name="h200"):
  """A device to compile for: "h100" or "h200".

  Raises:
    ValueError: for another name.
    RuntimeError: without the compiler.
  """
  if name not in TARGETS:
    raise ValueError(
      f"name={name!r} is unknown; allowed: {', '.join(map(repr, TARGETS))}"
    )
  reason = missing()
  if reason is not None:
    raise RuntimeError(reason)
  return topologies.get_topology_desc(
    platform="cuda", target_config=TARGETS[name], topology="1x1x1"
  ).devices[0]


def report(source):
  """Compiles in a process of its own, and reports on its Mosaic kernels.

  Args:
    source: Python source that compiles something with `aot.compile_for`.

  Returns:
    `[Kernel, ...]` in the order of compilation.

  Raises:
    RuntimeError: if the process fails, with the end of what it wrote.
  """
  with tempfile.TemporaryDirectory() as directory:
    path = (os.path.dirname(_program(name)) for name in _PROGRAMS)
    env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "MOSAIC_GPU_DUMP_TO": directory,
      "PATH": os.pathsep.join((*path, os.environ.get("PATH", ""))),
      "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    child = subprocess.run(
      [sys.executable, "-c", source],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      check=False,
    )
    if child.returncode:
      raise RuntimeError(f"compilation failed:\n{child.stdout[-2000:]}")
    found = re.compile(r"(\w+)_(\d+)\.ptxas").fullmatch
    names = filter(None, map(found, os.listdir(directory)))
    names = sorted((int(x[2]), x[1]) for x in names)
    return [_kernel(directory, name, number) for number, name in names]


def _kernel(directory, name, number):
  """Reads what was written about one kernel."""

  def read(*endings):
    for ending in endings:
      path = os.path.join(directory, f"{name}_{number}.{ending}")
      if os.path.exists(path):
        with open(path) as file:
          return file.read()
    return ""

  log, passes = read("ptxas"), read("mlir-passes.log")
  find = lambda pattern, text: int(re.search(pattern, text)[1])
  return Kernel(
    name,
    find(r"Used (\d+) registers", log),
    find(r"(\d+) bytes spill stores, \d+ bytes spill loads\n", log),
    find(r"dynamic_shared_memory_size %c(\d+)_i32", passes),
    tuple(x for x in log.splitlines() if "warning" in x or "serializ" in x),
    read("ptx"),
    read("sass", "sass_ctrl"),
  )
