"""The implementations of an operation by name, and the choice among them.

A module of an operation's folder plugs in by defining `IMPLEMENTATIONS`, a
tuple of objects with a `name` (for example "tpu" and "tpu_interpret"). They
are imported on first use, so that a missing accelerator toolchain costs
nothing.
"""

import functools
import importlib
import importlib.util

from pallas_kernels import aot

# In order of preference. Modules of other platforms are simply not asked.
_MODULES = ("tpu", "gpu", "xla", "reference")


@functools.cache
def implementations(package):
  """Returns all implementations, `{name: Implementation}`, best first.

  Args:
    package: the operation's, as "pallas_kernels.attention_mass".
  """
  found = {}
  for name in _MODULES:
    path = f"{package}.{name}"
    if importlib.util.find_spec(path) is not None:
      for implementation in importlib.import_module(path).IMPLEMENTATIONS:
        found[implementation.name] = implementation
  return found


def choose(known, call, implementation=None, platform=None):
  """Chooses an implementation.

  Args:
    known: `{name: Implementation}` in order of preference; an implementation
      has `platforms` and `supports(*call)`, which returns None or the reason
      why it cannot run this call.
    call: the operands and static options of the call.
    implementation: a name, or None for the first that declares the platform
      and supports the call.
    platform: "cpu", "gpu" or "tpu"; by default `aot.platform()`: the default
      backend's, or the one that is compiled for.

  Returns:
    One of the implementations.

  Raises:
    ValueError: for an unknown name.
    NotImplementedError: if the named one does not support the call.
  """
  if implementation is not None:
    if implementation not in known:
      raise ValueError(
        f"implementation={implementation!r} is unknown; allowed: None, "
        f"{', '.join(map(repr, known))}"
      )
    chosen = known[implementation]
    reason = chosen.supports(*call)
    if reason is not None:
      raise NotImplementedError(
        f"implementation={implementation!r} cannot run: {reason}"
      )
    return chosen
  platform = platform or aot.platform()
  for candidate in known.values():
    if platform in candidate.platforms and candidate.supports(*call) is None:
      return candidate
  raise NotImplementedError(
    f"no implementation supports this call on platform {platform!r}"
  )
