"""Every test runs on the CPU backend with eight virtual devices.

The settings must be made before JAX is imported, and hold in the worker
processes of pytest-xdist as well.
"""

import gc
import os
import resource
import subprocess
import sys

DEVICES = 8

# With it off, and LLVM not optimising (below), ToMe in a small ViT compiles in
# a seventh of the time. Tests compile far longer than they compute.
EMITTERS = "--xla_cpu_use_fusion_emitters=false"
# One module of machine code for each program: there are no cores for more.
UNDIVIDED = "--xla_cpu_parallel_codegen_split_count=1"
# Eight devices share two cores; by default XLA ends the process when they do
# not meet within 40 seconds, as happens on a busy machine.
PATIENCE = (
  "--xla_cpu_collective_timeout_seconds=600"
  " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)


def known(flag: str) -> bool:
  """Whether the installed XLA takes a flag: it ends a process if not."""
  command = [sys.executable, "-c", "import jax; jax.devices()"]
  setting = {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    command, env={**os.environ, **setting}, capture_output=True
  )
  return done.returncode == 0


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if "TOKJAX_TEST_FLAGS" not in os.environ:
  # Worker processes inherit what the first process has found.
  os.environ["TOKJAX_TEST_FLAGS"] = " ".join(
    flag for flag in (EMITTERS, UNDIVIDED, PATIENCE) if known(flag)
  )
  os.environ["XLA_FLAGS"] = " ".join(
    (
      os.environ.get("XLA_FLAGS", ""),
      os.environ["TOKJAX_TEST_FLAGS"],
      f"--xla_force_host_platform_device_count={DEVICES}",
    )
  )
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_LEGACY_PRNG_KEY"] = "error"
# Models and data sets of tests are made on the spot, never downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# Tracing makes many objects that live on, and what was imported never goes:
# looking through all of it every 700 objects took a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 50, 100)

# The first example of a shape compiles, so that time says nothing.
hypothesis.settings.register_profile(
  "tokjax", deadline=None, derandomize=True, max_examples=25
)
hypothesis.settings.load_profile("tokjax")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
  """Gives tests that share a fixture of their module one worker.

  Two workers would both make it; where each case has its own, that is no loss.
  Slow ones come first, so that no worker is left with one at the end.
  """
  items.sort(key=lambda item: item.get_closest_marker("slow") is None)
  for item in items:
    made = item._fixtureinfo.name2fixturedefs.values()
    own = [
      fixture
      for found in made
      for fixture in found
      if fixture.scope == "module" and not fixture.params
      and fixture.func.__module__ == item.module.__name__
    ]  # fmt: skip
    if own and item.get_closest_marker("xdist_group") is None:
      item.add_marker(pytest.mark.xdist_group(item.module.__name__))


def pytest_configure(config):
  """Refuses versions of pytest that hide groups of tests from pytest-xdist."""
  spread = config.getoption("numprocesses", None)
  if spread and pytest.version_tuple >= (9, 2):
    raise pytest.UsageError(
      f"pytest {pytest.__version__} hides groups of tests from pytest-xdist;"
      " pip install 'pytest<9.2'"
    )


@pytest.fixture(scope="session", autouse=True)
def devices() -> list[jax.Device]:
  """The virtual devices, for tests that shard."""
  found = jax.devices()
  assert len(found) == DEVICES, "JAX was imported before tests/conftest.py"
  return found


# Compiled programs of one process, beyond which those of finished modules go.
MEMORY_LIMIT = 3 * 2**30


def resident_bytes() -> int:
  """Memory that this process holds."""
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * resource.getpagesize()


@pytest.fixture(scope="module", autouse=True)
def bounded_memory():
  """Lets compiled programs go after a module once they fill the memory."""
  yield
  if os.path.exists("/proc/self/statm") and resident_bytes() > MEMORY_LIMIT:
    jax.clear_caches()
    gc.collect()
