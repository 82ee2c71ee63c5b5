"""TPU chips to compile for; needs libtpu (`pip install libtpu`), no TPU."""

import importlib.util
import os

import jax
from jax.experimental import topologies

# Smallest topologies that libtpu describes, one chip where it accepts that.
_ONE = {"chips_per_host_bounds": [1, 1, 1]}
TOPOLOGIES = {
  "v5e": ("v5e:1x1", _ONE),
  "v5p": ("v5p:2x2x1", {}),
  "v6e": ("v6e:1x1", _ONE),
  "v7x": ("tpu7x:2x2x1", {}),
}
# On a machine without TPU, libtpu would look for one on the network, and a
# second process would fail on a lock that only matters where there is a chip.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def missing():
  """Returns None, or why programs cannot be compiled for TPU here."""
  if importlib.util.find_spec("libtpu") is None:
    return (
      "libtpu is not installed; `pip install 'jax[tpu]'` or `pip install "
      "libtpu` brings the TPU compiler, which needs no TPU"
    )
  return None


def environment():
  """Settings of a process that has libtpu but no TPU."""
  return {} if jax.default_backend() == "tpu" else dict(_ENVIRONMENT)


def device(generation):
  """A device of a TPU generation: "v5e", "v5p", "v6e" or "v7x".

  Raises:
    ValueError: for another generation.
    RuntimeError: without libtpu.
  """
  if generation not in TOPOLOGIES:
    raise ValueError(
      f"generation={generation!r} is unknown; allowed: "
      f"{', '.join(map(repr, TOPOLOGIES))}"
    )
  reason = missing()
  if reason is not None:
    raise RuntimeError(reason)
  for name, value in environment().items():
    os.environ.setdefault(name, value)
  name, options = TOPOLOGIES[generation]
  return topologies.get_topology_desc(
    platform="tpu", topology_name=name, **options
  ).devices[0]
