"""The platform that kernels are traced for: the default backend, or a target.

An implementation refuses to run on a platform that is not its own. Compiling
ahead of time for a chip that is not here is the one case where the default
backend is not the platform, and it has to be said:

    with aot.compiling_for("tpu"):
      lowered = jax.jit(f).trace(*shapes).lower(lowering_platforms=("tpu",))

JAX caches traces by function and shapes, so trace a function of its own there,
not one that also runs on this machine.
"""

import contextlib
import contextvars

import jax

PLATFORMS = ("cpu", "gpu", "tpu")
_target = contextvars.ContextVar("pallas_kernels_platform", default=None)


@contextlib.contextmanager
def compiling_for(platform):
  """Lets kernels of `platform` ("cpu", "gpu" or "tpu") be traced inside.

  Raises:
    ValueError: for another name.
  """
  if platform not in PLATFORMS:
    raise ValueError(
      f"platform={platform!r} is unknown; allowed: "
      f"{', '.join(map(repr, PLATFORMS))}"
    )
  token = _target.set(platform)
  try:
    yield
  finally:
    _target.reset(token)


def platform():
  """The platform that `compiling_for` set, or `jax.default_backend()`."""
  return _target.get() or jax.default_backend()
