"""Stage f: the GPU kernels with other tiles, stages and warpgroups.

A backward row changes one of its two kernels and times both.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from bench import candidates
from bench.clock import Unavailable
from pallas_kernels.walks import contract, gpu_plan
from scripts.report import check_attention, sparse
from scripts.report.jobs import Here, Job

KINDS = {"forward": "forward", "d_q": "backward", "d_kv": "backward"}
TILES, DEPTHS, WARPGROUPS = (64, 128), (2, 3, 4, 5), (2, 1)
_FIELDS = ("tile", "depth", "warpgroups")
_CHECK = (check_attention.name(128, "top-k"),)
# Rounding differs from tile to tile.
_TOLERANCE = 1e-2


def jobs(here: Here) -> list[Job]:
  """Today's choice of each kernel, then what is nearest to it."""
  setting = sparse.Setting("tiles", 32768, here.kernel)
  plans = [(kind, plan) for kind in KINDS for plan in plans_of(setting, kind)]
  # All kernels' choices of today first, then all that differ in one field.
  plans.sort(key=lambda x: _distance(x[1], today(setting, x[0])))
  if here.tiny:
    plans, setting = plans[:1], setting.shrunk()
  return [
    Job(_name(kind, plan), functools.partial(_try, here, setting, kind, plan),
        _CHECK)
    for kind, plan in plans
  ]  # fmt: skip


def today(setting: sparse.Setting, kind: str) -> gpu_plan.Plan:
  """The plan that a call gets."""
  shape = lambda heads: jax.ShapeDtypeStruct(
    (1, setting.length, heads, setting.head_size), jnp.bfloat16
  )
  q, k = shape(setting.heads), shape(setting.key_heads)
  layout = jax.eval_shape(lambda: sparse.layout_of(setting, "full"))
  return gpu_plan.make(contract.Operands(q, k, k, None, layout), kind)


def plans_of(setting: sparse.Setting, kind: str) -> list[dict[str, int]]:
  """Values of `_FIELDS` that fit the shared memory."""
  own = today(setting, kind)
  mine = {name: getattr(own, name) for name in _FIELDS}
  found = [mine]
  for values in itertools.product(TILES, DEPTHS, WARPGROUPS):
    changed = dict(zip(_FIELDS, values, strict=True))
    with gpu_plan.changing(kind, **changed):
      plan = today(setting, kind)
    if plan.shared_memory() <= gpu_plan.SHARED_MEMORY and changed != mine:
      found.append(changed)
  return found


def _distance(plan, own) -> int:
  return sum(value != getattr(own, name) for name, value in plan.items())


def _name(kind: str, plan: dict[str, int]) -> str:
  return f"{kind}: " + ", ".join(f"{n} {value}" for n, value in plan.items())


def _try(here: Here, setting, kind: str, plan: dict[str, int]):
  """Times a plan, if its results are those of today's."""
  if here.platform == "tpu":
    raise Unavailable("the tiles are those of the GPU kernels")
  candidate = _compiled(setting, kind, plan)
  error = _difference(candidate.run(), _expected(setting, KINDS[kind]))
  fields = {"same results": error <= _TOLERANCE, "difference": error}
  if fields["same results"]:
    fields |= here.timed(candidate, against=_today_name(kind))
  return fields


def _today_name(kind: str) -> str:
  setting = sparse.Setting("tiles", 32768, "gpu")
  return _name(kind, plans_of(setting, kind)[0])


def _compiled(setting, kind, plan) -> candidates.Candidate:
  """Attention over a tenth of the blocks, one of its kernels by this plan."""
  layout = sparse.layout_of(setting, "top-k")
  with gpu_plan.changing(kind, **plan):
    # A function of its own, which nothing was traced of before.
    attend = lambda *x: candidates.attention(setting.implementation)(*x)
    return candidates.timed(
      kind, sparse.DENSITY, attend, (*setting.inputs(), layout), KINDS[kind]
    )


@functools.lru_cache(maxsize=2)
def _expected(setting, direction):
  """Results of today's plans."""
  kind = next(kind for kind, way in KINDS.items() if way == direction)
  return _compiled(setting, kind, {}).run()


@jax.jit
def _error(a, b):
  a, b = (x.astype(jnp.float32) for x in (a, b))
  return jnp.linalg.norm(a - b) / jnp.linalg.norm(b)


def _difference(found, expected) -> float:
  """The largest relative difference of an array."""
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  # Layouts have no gradients that count: those of float0 are left out.
  return max(float(_error(a, b)) for a, b in pairs)
