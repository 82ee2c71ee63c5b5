"""Stage a: attention mass, decode and linear attention against float64.

Tiny runs leave gradients to the tests of the operations.
"""

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels import decode_attention, linear_attention
from pallas_kernels import layout as layouts
from pallas_kernels.attention_mass import masses
from scripts.report import exact
from scripts.report.jobs import Here, Job

MASS, DECODE, LINEAR = "attention_mass", "decode_attention", "linear_attention"
READS = ("all", "blocks", "tokens")


def name(operation: str, implementation: str, head_size: int, how="") -> str:
  """Of the check that something timed rests on."""
  return f"{operation} {implementation} {head_size} {how}".strip()


def jobs(here: Here) -> list[Job]:
  """Every implementation that there is for this platform."""
  found = []

  def add(check, operation, head_size, how=""):
    for one in here.implementations(operation):
      run = functools.partial(check, here, one, head_size, *filter(None, [how]))
      found.append(Job(name(operation, one, head_size, how), run))

  for head_size in (128, 64, 256):
    add(_mass, MASS, head_size)
    for how in READS[: 2 if here.tiny else 3]:
      add(_decode, DECODE, head_size, how)
    add(_linear, LINEAR, head_size)
    if here.tiny:
      break
  return found


def _mass(here, implementation, head_size):
  n, block = (48, 16) if here.tiny else (512, 128)
  rng = np.random.default_rng(0)
  arrays = {"q": _drawn(rng, 2, n, 4, head_size)}
  arrays["k"] = _drawn(rng, 2, n, 2, head_size)
  layout = layouts.from_pattern(
    layouts.Causal(), q_len=n, block_q=block, block_k=block
  )
  call = lambda arrays, layout, implementation: masses(
    **arrays, layout=layout, implementation=implementation
  )
  return exact.check(call, arrays, layout, implementation, not here.tiny)


def _decode(here, implementation, head_size, how):
  n, block = (96, 16) if here.tiny else (2048, 128)
  rng = np.random.default_rng(0)
  arrays = {"q": _drawn(rng, 2, 1, 8, head_size)}
  arrays |= {name: _drawn(rng, 2, n, 2, head_size) for name in "kv"}
  fixed = {"lengths": np.asarray([n, n // 3], np.int32)}
  if how != "all":
    units = n if how == "tokens" else n // block
    listed = [rng.permutation(units)[: max(2, units // 4)] for _ in range(4)]
    fixed[how] = np.reshape(listed, (2, 2, -1)).astype(np.int32)
  call = lambda arrays, fixed, implementation: decode_attention(
    **arrays, **fixed, block_size=block, splits=2, return_lse=True,
    implementation=implementation,
  )  # fmt: skip
  return exact.check(call, arrays, fixed, implementation, backward=False)


def _linear(here, implementation, head_size):
  n, block = (48, 16) if here.tiny else (700, 128)
  rng = np.random.default_rng(0)
  arrays = {"q": _drawn(rng, 2, n, 4, head_size)}
  arrays |= {name: _drawn(rng, 2, n, 2, head_size) for name in "kv"}
  arrays["log_decay"] = -np.asarray([0, 0.002, 0.05, 3], np.float32)
  call = lambda arrays, _, implementation: linear_attention(
    **arrays, scale=head_size**-0.5, block=block, return_state=True,
    implementation=implementation,
  )  # fmt: skip
  return exact.check(call, arrays, None, implementation, not here.tiny)


def _drawn(rng, *shape):
  return np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16))
