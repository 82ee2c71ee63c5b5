"""What a program costs, from the compiler's own analysis of it.

Nothing is estimated from layer sizes: a function is compiled for its arguments
as it will run, so that scoring, selection and moving of tokens are in the
count. `measure` gives the totals, `by_block` the parts, `mfu` relates a
measured time to the peak of the device.

The compiler counts the body of a loop once, however often it runs. Loops of a
known number of rounds (`lax.scan`, `fori_loop` with constant bounds) are
therefore compiled a second time on their own and added for the other rounds;
a loop that only the data ends makes the cost a lower bound, `exact=False`.
Custom kernels (Pallas) count as much as they declare to the compiler.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

# Dense bfloat16 peak of one JAX device, FLOP/s, by the words that its kind
# begins with. Sources: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} ("peak
# compute per chip"); NVIDIA's data sheets of A100, A10, L4, H100 and H200 (the
# figures "with sparsity" halved).
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "NVIDIA A10": 125e12,
  "NVIDIA A100": 312e12,
  "NVIDIA L4": 121e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA H200 NVL": 835e12,
}

BLOCK = r"(?:^|/)(block_\d+)(?:/|$)"
REST = "rest"


@dataclasses.dataclass(frozen=True)
class Cost:
  """Cost of one call.

  Attributes:
    flops: floating point operations; a multiply-add is two.
    bytes: read and written by all operations, as the compiler accounts.
    peak_memory: bytes of arguments, results and temporaries that are alive
      together; of a sum, the largest.
    exact: False if the program has a loop of unknown length, whose body is
      counted once: flops and bytes are then lower bounds.
  """

  flops: float = 0.0
  bytes: float = 0.0
  peak_memory: int = 0
  exact: bool = True

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(
      self.flops + other.flops,
      self.bytes + other.bytes,
      max(self.peak_memory, other.peak_memory),
      self.exact and other.exact,
    )

  def times(self, rounds: int) -> "Cost":
    """The cost of `rounds` calls one after another."""
    if rounds == 0:
      return Cost(exact=self.exact)
    return dataclasses.replace(
      self, flops=self.flops * rounds, bytes=self.bytes * rounds
    )


def measure(
  function: Callable[..., Any],
  *args: Any,
  compiled: jax.stages.Compiled | None = None,
) -> Cost:
  """Cost of `function(*args)`, compiled for the default device.

  Args:
    function: jitted or not; static arguments must be bound beforehand.
    *args: arrays or `jax.ShapeDtypeStruct`s; values do not matter.
    compiled: the program of this function and these shapes, if there is one
      already: saves compiling it again.
  """
  jaxpr = _trace(function, args)
  first = _compiled(jaxpr) if compiled is None else _analysis(compiled)
  return first + _further_rounds(jaxpr.jaxpr)


def by_block(
  function: Callable[..., Any], *args: Any, scope: str = BLOCK
) -> dict[str, Cost]:
  """Cost of `function(*args)` split by the block in which it arises.

  Every operation belongs to the Flax module (or `jax.named_scope`) that it was
  traced in. The operations of a block are compiled together, apart from the
  others: the sum is close to `measure`, which in addition saves what can be
  fused across blocks.

  Args:
    function, *args: as in `measure`.
    scope: regular expression searched in the scope's path, such as
      "ViT/encoder/block_3/mlp"; its first group names the part.

  Returns:
    Parts in order of appearance; what matches nowhere is "rest".
  """
  jaxpr = _trace(function, args)
  parts: dict[str, list[Any]] = collections.defaultdict(list)
  for eqn in _live(jaxpr.jaxpr):
    found = re.search(scope, str(eqn.source_info.name_stack))
    parts[found.group(1) if found else REST].append(eqn)
  names = sorted(parts, key=lambda name: name == REST)
  return {name: _cost(_part(jaxpr, parts, name)) for name in names}


def peak_flops(device_kind: str) -> float | None:
  """Peak of a device, FLOP/s; None: not known.

  Args:
    device_kind: as JAX names it. Whole words count, the longest name first:
      "NVIDIA A100-SXM4-80GB" is an A100, "NVIDIA A10G" is no A10. A part of a
      device (MIG) is not known.
  """
  if " MIG " in f"{device_kind} ":
    return None
  for name in sorted(PEAK_FLOPS, key=len, reverse=True):
    if re.fullmatch(rf"{re.escape(name)}(?![A-Za-z0-9]).*", device_kind):
      return PEAK_FLOPS[name]
  return None


def mfu(
  flops: float, seconds: float, device_kind: str | None = None
) -> float | None:
  """Fraction of the device's peak that was used; None where it is unknown.

  Args:
    flops: of one call on one device, see `measure`.
    seconds: that it took.
    device_kind: as JAX names it; default: the first device's. The peak is that
      of bfloat16 products, so that float32 programs show what they leave.
  """
  if not seconds > 0:
    raise ValueError(f"seconds={seconds}: must be positive")
  if device_kind is None:
    device_kind = jax.devices()[0].device_kind
  peak = peak_flops(device_kind)
  return None if peak is None else flops / seconds / peak


def _trace(function, args) -> core.ClosedJaxpr:
  """The program as one jaxpr; a call of one jitted function is opened."""
  jaxpr = jax.make_jaxpr(function)(*args)
  while len(jaxpr.eqns) == 1 and jaxpr.eqns[0].primitive.name == "jit":
    (eqn,) = jaxpr.eqns
    # A constant among the arguments keeps it closed; that costs nothing.
    if list(eqn.invars) != list(jaxpr.jaxpr.invars):
      break
    jaxpr = eqn.params["jaxpr"]
  return jaxpr


def _cost(jaxpr: core.ClosedJaxpr) -> Cost:
  """Cost of a jaxpr with all rounds of its loops."""
  return _compiled(jaxpr) + _further_rounds(jaxpr.jaxpr)


def _compiled(jaxpr: core.ClosedJaxpr) -> Cost:
  """What the compiler says; loop bodies are counted once."""
  structs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jaxpr.in_avals]
  return _analysis(jax.jit(core.jaxpr_as_fun(jaxpr)).lower(*structs).compile())


def _analysis(program: jax.stages.Compiled) -> Cost:
  analysis = program.cost_analysis() or {}
  memory = program.memory_analysis()
  peak = 0
  if memory is not None:
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak += memory.temp_size_in_bytes - memory.alias_size_in_bytes
  return Cost(
    float(analysis.get("flops", 0.0)),
    float(analysis.get("bytes accessed", 0.0)),
    peak,
  )


def _further_rounds(jaxpr: core.Jaxpr) -> Cost:
  """What `_compiled` misses: the rounds of loops after the first."""
  total = Cost()
  for eqn in _live(jaxpr):
    if eqn.primitive.name == "scan":
      body, length = eqn.params["jaxpr"], eqn.params["length"]
      unroll = eqn.params["unroll"]
      # The compiler sees `unroll` rounds and those that do not divide.
      seen = min(length, unroll + length % unroll)
      total += _further_rounds(body.jaxpr)
      if length > seen:
        total += _cost(body).times(length - seen)
    elif eqn.primitive.name == "while":
      body = eqn.params["body_jaxpr"]
      total += dataclasses.replace(_further_rounds(body.jaxpr), exact=False)
    elif eqn.primitive.name == "cond":
      # As the compiler does: the most expensive branch.
      branches = [_further_rounds(b.jaxpr) for b in eqn.params["branches"]]
      total += max(branches, key=lambda cost: cost.flops)
    elif eqn.primitive.name != "pallas_call":
      total += sum(map(_further_rounds, _inner(eqn)), Cost())
  return total


def _inner(eqn: Any) -> Iterator[core.Jaxpr]:
  """The jaxprs that an equation calls."""
  for value in eqn.params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item


def _variables(atoms: Any) -> set[Any]:
  return {a for a in atoms if not isinstance(a, core.Literal)}


def _live(jaxpr: core.Jaxpr) -> list[Any]:
  """The equations that the outputs depend on, in order."""
  wanted, live = _variables(jaxpr.outvars), []
  for eqn in reversed(jaxpr.eqns):
    if eqn.effects or wanted & set(eqn.outvars):
      live.append(eqn)
      wanted |= _variables(eqn.invars)
  return live[::-1]


def _part(jaxpr: core.ClosedJaxpr, parts: dict, name: str) -> core.ClosedJaxpr:
  """The equations of one part as a program of its own.

  It takes what it reads of the others and returns what they, or the whole,
  read of it.
  """
  eqns = parts[name]
  made = {v for eqn in eqns for v in eqn.outvars}
  read = dict.fromkeys(v for eqn in eqns for v in _variables(eqn.invars))
  wanted = _variables(jaxpr.jaxpr.outvars)
  for other in parts:
    if other != name:
      wanted |= {v for eqn in parts[other] for v in _variables(eqn.invars)}
  constants = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
  used = [v for v in read if v in constants]
  inputs = [v for v in read if v not in made and v not in constants]
  outputs = [v for eqn in eqns for v in eqn.outvars if v in wanted]
  part = core.Jaxpr(
    constvars=used,
    invars=inputs,
    outvars=outputs,
    eqns=eqns,
    effects=jaxpr.effects,
    debug_info=core.DebugInfo(
      "cost", name, ("",) * len(inputs), ("",) * len(outputs)
    ),
  )
  return core.ClosedJaxpr(part, [constants[v] for v in used])
