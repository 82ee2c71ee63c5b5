"""Stage d: decode, attention mass and linear attention next to XLA's forms."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from bench import candidates
from pallas_kernels import decode_attention, linear_attention
from pallas_kernels import layout as layouts
from pallas_kernels.attention_mass import masses
from pallas_kernels.walks import gpu_plan
from scripts.report import check_operations as checks
from scripts.report.jobs import Here, Job

HEADS, GROUPS, HEAD_SIZE = 32, 8, 128
BATCH = 4
# Entries that a decode step with lists of tokens reads.
TOKENS = 2048
# None: as many as the kernel takes by itself.
SPLITS, OTHER_SPLITS = None, (2, 8, 16, 32)
# Entries of a tile, and tiles that are on their way.
OTHER_PLANS = (
  {"tile": 128, "depth": 2}, {"tile": 64, "depth": 6}, {"tile": 64, "depth": 4}
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of the calls of this stage; `block` is in tokens."""

  caches: tuple[int, ...] = (32768, 131072)
  masses: int = 16384
  linear: int = 32768
  tokens: int = TOKENS
  block: int = 128


TINY = Sizes(caches=(64,), masses=64, linear=64, tokens=16, block=16)


def jobs(here: Here) -> list[Job]:
  """Something of every operation first; XLA takes long over long caches."""
  sizes = TINY if here.tiny else Sizes()
  short, *long = sizes.caches
  reads = checks.READS[: 2 if here.tiny else 3]
  found = [job for how in reads for job in _decodes(here, sizes, short, how)]
  for direction in ("forward", "backward")[: 1 if here.tiny else 2]:
    for implementation in here.implementations(checks.MASS):
      found.append(_mass(here, sizes, implementation, direction))
    for implementation in here.implementations(checks.LINEAR):
      found.append(_linear(here, sizes, implementation, direction))
  found += _tuned(here, sizes)
  for n in long:
    found += [job for how in reads for job in _decodes(here, sizes, n, how)]
  return found


def _normal(seed: int, *shape: int):
  return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


@functools.lru_cache(maxsize=1)
def _cache(n: int):
  """A query for each text, and their keys and values."""
  k, v = (_normal(seed, BATCH, n, GROUPS, HEAD_SIZE) for seed in (1, 2))
  return _normal(0, BATCH, 1, HEADS, HEAD_SIZE), k, v


def _tuned(here: Here, sizes: Sizes) -> list[Job]:
  """The kernel of decoding with other numbers, for the next tuning."""
  found = []

  def add(label, plan, splits=SPLITS):
    for job in _decodes(here, sizes, sizes.caches[0], "blocks", splits):
      if job.name.endswith(here.kernel):
        run = functools.partial(_changed, plan, job.run)
        name = f"{job.name}, {label}"
        found.append(dataclasses.replace(job, name=name, run=run))

  for splits in OTHER_SPLITS[: 1 if here.tiny else None]:
    add(f"{splits} splits", {}, splits)
  for plan in OTHER_PLANS if here.kernel == "gpu" else ():
    add(", ".join(f"{n} {value}" for n, value in plan.items()), plan)
  return found


def _changed(plan, run):
  """What `run` measures with another plan of the GPU kernel."""
  with gpu_plan.changing("decode", **plan):
    return run()


def _decodes(
  here: Here, sizes: Sizes, n: int, how: str, splits: int | None = SPLITS
) -> list[Job]:
  """All implementations, next to JAX's dense attention."""
  read = {"all": n, "blocks": n // 10, "tokens": min(sizes.tokens, n)}[how]
  read = max(read // sizes.block, 1) * sizes.block
  moved = 2 * BATCH * read * GROUPS * HEAD_SIZE * 2
  label = f"decode {n} {how}" if how == "all" else f"decode {n} {how} ({read})"

  def run(fn):
    inputs = _cache(n)
    if how != "all":
      unit = sizes.block if how == "blocks" else 1
      inputs = (*inputs, _listed(n // unit, read // unit))
    candidate = candidates.timed(how, read / n, fn, inputs, "forward")
    return here.timed(candidate, bytes=moved, against=f"decode {n} dense")

  def attend(implementation, q, k, v, listed=None):
    selection = {} if listed is None else {how: listed}
    return decode_attention(
      q, k, v, **selection, block_size=sizes.block, splits=splits,
      implementation=implementation,
    )  # fmt: skip

  found = []
  if how == "all":
    plain = lambda: run(candidates.stock_xla)
    found.append(Job(f"decode {n} dense", plain))
  for one in here.implementations(checks.DECODE):
    check = checks.name(checks.DECODE, one, HEAD_SIZE, how)
    fn = functools.partial(run, functools.partial(attend, one))
    found.append(Job(f"{label} {one}", fn, (check,)))
  return found


def _listed(units: int, count: int):
  """Numbers of blocks or tokens, in order, for each text and key head."""
  scores = jax.random.uniform(jax.random.key(3), (BATCH, GROUPS, units))
  return jnp.sort(jax.lax.top_k(scores, count)[1])


def _mass(here: Here, sizes: Sizes, implementation: str, direction: str) -> Job:
  """Column and block sums of causal attention, with a given log-sum-exp."""
  n = sizes.masses
  layout = functools.partial(
    layouts.from_pattern, layouts.Causal(), q_len=n, block_q=sizes.block,
    block_k=sizes.block,
  )  # fmt: skip
  pairs = HEADS * n * (n + 1) / 2

  def sums(q, k, lse, layout):
    return masses(q, k, lse=lse, layout=layout, implementation=implementation)

  def run():
    q, k = (_normal(i, 1, n, HEADS, HEAD_SIZE) for i in (0, 1))
    # What is left out of the sums with random scores is small.
    lse = jnp.full((1, HEADS, n), math.log(n), jnp.float32)
    candidate = candidates.timed(
      "mass", 0.5, sums, (q, k, lse, layout().with_transpose()), direction
    )
    flops = {"forward": 2, "backward": 6}[direction] * pairs * HEAD_SIZE
    return here.timed(
      candidate, flops=flops, against=_against("mass", direction)
    )

  check = checks.name(checks.MASS, implementation, HEAD_SIZE)
  return Job(f"mass {direction} {implementation}", run, (check,))


def _linear(here, sizes: Sizes, implementation: str, direction: str) -> Job:
  """With a decay for each head."""
  n = sizes.linear
  numbers = n * HEADS * HEAD_SIZE
  flops = {"forward": 4, "backward": 10}[direction] * numbers * HEAD_SIZE
  moved = {"forward": 4, "backward": 7}[direction] * numbers * 2

  def run():
    inputs = tuple(_normal(i, 1, n, HEADS, HEAD_SIZE) for i in range(3))
    decay = -(2.0 ** -jnp.linspace(1, 8, HEADS))
    attend = lambda q, k, v, decay: linear_attention(
      q, k, v, log_decay=decay, implementation=implementation
    )
    candidate = candidates.timed(
      "linear", 1.0, attend, (*inputs, decay), direction
    )
    return here.timed(
      candidate, flops=flops, bytes=moved, against=_against("linear", direction)
    )

  check = checks.name(checks.LINEAR, implementation, HEAD_SIZE)
  return Job(f"linear {direction} {implementation}", run, (check,))


def _against(operation: str, direction: str) -> str:
  return f"{operation} {direction} xla"
