"""Calls of block-sparse attention that every implementation must get right."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import layout as layouts


@dataclasses.dataclass(frozen=True)
class Case:
  """Sizes, the kind of mask, the kind of numbers, and what else is on."""

  name: str
  batch: int = 2
  q_len: int = 48
  k_len: int = 48
  heads: int = 2
  groups: int = 2
  width: int = 16
  v_width: int = 16
  block_q: int = 16
  block_k: int = 16
  mask: Any = layouts.Causal()
  numbers: str = "normal"
  bias: bool = False
  sinks: bool = False
  soft_cap: float | None = None


LOCAL = layouts.Causal() & (layouts.Window(20) | layouts.Sinks(3))

# Cases of one structure share a compilation: those called "random" or
# "nothing" with a bias differ in numbers only.
CASES = (
  Case("causal"),
  Case("random_mask", mask="random", bias=True),
  Case("huge_logits", numbers="huge", mask="random", bias=True),
  Case("huge_bias", numbers="huge_bias", mask="random", bias=True),
  Case("hidden_by_bias", numbers="hidden", bias=True, mask="random"),
  Case("one_hot", numbers="one_hot", mask="random", bias=True),
  Case("ties", numbers="ties", mask="random", bias=True),
  Case("all_hidden", mask="nothing", bias=True),
  Case("random_blocks", mask="blocks", q_len=64, k_len=64),
  Case("grouped", heads=6, groups=2, mask=LOCAL, bias=True),
  Case("ragged", q_len=37, k_len=53, mask="random"),
  Case("ragged_everything", q_len=37, k_len=53, mask=layouts.Full()),
  Case("longer_keys", q_len=20, k_len=70, mask=layouts.Causal(50)),
  Case("unequal_blocks", block_q=8, block_k=32, mask=LOCAL, k_len=50),
  Case("value_width", width=24, v_width=8, mask=LOCAL),
  Case("sinks_and_cap", sinks=True, soft_cap=2.0, bias=True, mask="random"),
  Case(
    "tiny",
    batch=1,
    q_len=1,
    k_len=1,
    heads=1,
    groups=1,
    width=1,
    v_width=1,
    mask=layouts.Full(),
  ),
  Case(
    "per_head",
    heads=3,
    groups=1,
    mask=layouts.PerHead(
      (layouts.Causal(), layouts.Window(5, 5), layouts.criss_cross(7))
    ),
  ),
  Case("segments", mask="segments", bias=True),
  Case("union_of_layouts", mask="union", bias=True),
  # Blocks as large as accelerators want them.
  Case(
    "large_random",
    batch=1,
    q_len=256,
    k_len=256,
    groups=1,
    width=128,
    v_width=128,
    block_q=128,
    block_k=128,
    mask="blocks",
  ),
)


LARGE_LOCAL = layouts.Causal() & (layouts.Window(150) | layouts.Sinks(3))


def large(name, **options):
  """A case in blocks of 128, the least that the TPU kernels take."""
  sizes = {
    "batch": 1,
    "q_len": 200,
    "k_len": 300,
    "block_q": 128,
    "block_k": 128,
  }
  return Case(name, **(sizes | options))


def wide(name, **options):
  """The same with heads that are as wide as suits the GPU kernels."""
  return large(name, **({"width": 64, "v_width": 64} | options))


# Cases that the GPU kernels take.
LARGE = (
  # Two heads that share keys and lists in one thread block; padded heads.
  wide(
    "pairs",
    batch=2,
    heads=4,
    groups=2,
    block_q=64,
    block_k=64,
    width=40,
    v_width=100,
    mask=LARGE_LOCAL,
    bias=True,
  ),
  # Stored element masks and everything else that there is.
  wide(
    "everything_on",
    groups=1,
    mask="random",
    numbers="hidden",
    bias=True,
    sinks=True,
    soft_cap=2.0,
  ),
  # d_k and d_v apart; more steps than stages, so that buffers are used again.
  wide("wide", groups=1, width=256, v_width=200, mask=LARGE_LOCAL, bias=True),
  # d_bias apart too.
  wide(
    "capped",
    width=256,
    v_width=256,
    mask=LARGE_LOCAL,
    bias=True,
    soft_cap=2.0,
  ),
  wide("segments", batch=2, q_len=300, mask="segments", bias=True),
  wide("tags", q_len=256, k_len=256, heads=1, groups=1, mask="union"),
  # One warpgroup alone, full blocks only.
  wide(
    "single",
    heads=1,
    groups=1,
    block_q=64,
    block_k=192,
    q_len=70,
    k_len=576,
    mask=layouts.Full(),
  ),
  wide("nothing", heads=1, groups=1, mask="nothing"),
)


def inputs(case, dtype=np.float32):
  """Arrays of a case by name, NumPy; bias and sinks may be missing."""
  rng = np.random.default_rng(len(case.name) + case.q_len)
  draw = lambda *shape: rng.normal(size=shape)
  n = case.batch
  q = draw(n, case.q_len, case.heads, case.width)
  k = draw(n, case.k_len, case.groups, case.width)
  v = draw(n, case.k_len, case.groups, case.v_width)
  bias = draw(n, case.heads, case.k_len)
  if case.numbers == "huge":
    q, k = q * 300, k * 300
  elif case.numbers == "huge_bias":
    bias = bias * 1e4
  elif case.numbers == "hidden":
    bias = np.where(rng.random(bias.shape) < 0.5, -np.inf, bias)
  elif case.numbers == "one_hot":
    q = 1e3 * np.eye(case.width)[rng.integers(case.width, size=q.shape[:3])]
    k = np.eye(case.width)[rng.integers(case.width, size=k.shape[:3])]
  elif case.numbers == "ties":
    q, k = np.ones_like(q), np.ones_like(k)
  found = {
    name: np.asarray(jnp.asarray(x, dtype))
    for name, x in {"q": q, "k": k, "v": v}.items()
  }
  if case.bias:
    found["bias"] = bias.astype(np.float32)
  if case.sinks:
    found["sinks"] = draw(case.heads).astype(np.float32)
  return found


def mask_and_layout(case):
  """The element mask `[b, H, q_len, k_len]`, and a layout that says it."""
  rng = np.random.default_rng(len(case.name))
  sizes = {"block_q": case.block_q, "block_k": case.block_k}
  lengths = {"q_len": case.q_len, "k_len": case.k_len}
  shape = (case.batch, case.heads, case.q_len, case.k_len)
  if isinstance(case.mask, layouts.Pattern):
    return (
      np.broadcast_to(elements(case.mask, case), shape),
      layouts.from_pattern(case.mask, **lengths, **sizes),
    )
  if case.mask == "segments":
    ids = np.sort(rng.integers(3, size=(case.batch, case.q_len)), axis=1)
    mask = ids[:, None, :, None] == ids[:, None, None, :]
    return np.broadcast_to(mask, shape), jitted(layouts.from_segments, **sizes)(
      ids
    )
  if case.mask == "union":
    a, b = layouts.Causal() & layouts.Window(9), layouts.Dilated(16)
    mask = elements(a, case) | elements(b, case)
    layout = [layouts.from_pattern(x, **lengths, **sizes) for x in (a, b)]
    return np.broadcast_to(mask, shape), jitted(layouts.union)(*layout)
  if case.mask in ("blocks", "causal blocks"):
    grid = (-(-case.q_len // case.block_q), -(-case.k_len // case.block_k))
    kinds = 2 * (rng.random((case.batch, case.groups) + grid) < 0.5)
    mask_fn = layouts.Causal() if "causal" in case.mask else None
    pattern = mask_fn or layouts.Full()
    allowed = layouts.block_kinds(pattern, *sizes.values(), *lengths.values())
    kinds = np.minimum(kinds, allowed)
    mask = np.repeat(np.repeat(kinds, case.block_q, 2), case.block_k, 3) > 0
    mask = np.repeat(
      mask[..., : case.q_len, : case.k_len], case.heads // case.groups, 1
    )
    make = jitted(layouts.from_kinds, **lengths, **sizes, mask_fn=mask_fn)
    return mask & elements(pattern, case), make(kinds.astype(np.int8))
  mask = rng.random(shape) < (0.3 if case.mask == "random" else 0)
  mask[..., : case.q_len // 3, :] = False  # Rows, and blocks, without keys.
  return mask, jitted(layouts.from_mask, **sizes)(mask)


@functools.cache
def jitted(fn, **options):
  """One compilation for all calls of a shape, not one per operation."""
  return jax.jit(functools.partial(fn, **options))


def elements(pattern, case):
  """A pattern's mask `[1, heads or 1, q_len, k_len]`, by calling it."""
  q, k = np.arange(case.q_len)[:, None], np.arange(case.k_len)[None, :]
  return np.stack(
    [
      np.broadcast_to(pattern(h, q, k), (case.q_len, case.k_len))
      for h in range(pattern.heads)
    ]
  )[None]
