"""Stage c: block-sparse attention next to dense attention, and planning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from bench import candidates, limits
from bench.candidates import Candidate, Unavailable
from pallas_kernels import layout as layouts
from scripts.report import check_attention
from scripts.report.jobs import Here, Job

DENSITY = 0.1
DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Setting:
  """Sizes, and what `bench.candidates` wants to know.

  Attributes:
    name: that rows begin with.
    length, heads, key_heads, head_size, block: of the attention; one example.
    implementation: of ours.
  """

  name: str
  length: int
  implementation: str
  heads: int = 32
  key_heads: int = 32
  head_size: int = 128
  block: int = 128
  dtype: str = "bfloat16"
  estimator: str = "mean_pooled"
  estimator_options: tuple = ()

  def shrunk(self) -> "Setting":
    """The same for a CPU."""
    return dataclasses.replace(
      self, length=self.length // 512, heads=2,
      key_heads=2 * self.key_heads // self.heads,
      head_size=self.head_size // 16, block=self.block // 16,
    )  # fmt: skip

  def inputs(self):
    return _inputs(self)

  def flops(self, density: float, direction: str) -> float:
    size = limits.Size(
      1, self.length, self.heads, self.key_heads, self.head_size, 2
    )
    return size.flops(density, direction)


@functools.lru_cache(maxsize=1)
def _inputs(setting):
  return candidates.random_inputs(
    setting, 1, setting.length, setting.head_size
  )


@functools.lru_cache(maxsize=2)
def layout_of(setting: Setting, kind: str) -> layouts.BlockLayout:
  """A layout with its transposed lists.

  "full" and "causal" are all pairs and those of the past. "top-k" and "causal
  top-k" list a tenth of the key blocks, chosen at random for each head and
  block of queries; the latter only of the past, with the diagonal.
  """
  sizes = {
    "q_len": setting.length, "block_q": setting.block, "block_k": setting.block
  }  # fmt: skip
  if kind == "full":
    return layouts.full(**sizes)
  if kind == "causal":
    return layouts.from_pattern(layouts.Causal(), **sizes)
  blocks = -(-setting.length // setting.block)
  options = {}
  if kind == "causal top-k":
    options = {"pattern": layouts.Causal(), "keep": layouts.Window(0)}

  @jax.jit
  def make(key):
    scores = jax.random.uniform(key, (1, setting.heads, blocks, blocks))
    rule = layouts.TopK(max(1, round(DENSITY * blocks)))
    found = layouts.from_scores(scores, rule, **sizes, **options)
    return found.with_transpose()

  return jax.block_until_ready(make(jax.random.key(0)))


def shown(layout: layouts.BlockLayout) -> float:
  """Share of pairs that are shown; partial blocks are those of a diagonal."""
  size = layout.block_q
  whole = float(jnp.mean(jnp.sum(layout.full_count, -1)))
  cut = float(jnp.mean(jnp.sum(layout.partial_count, -1)))
  pairs = whole * size**2 + cut * size * (size + 1) / 2
  return pairs / (layout.q_len * layout.k_len)


def ours(here: Here, setting: Setting, kind: str, direction: str) -> Job:
  """Our kernel over one kind of layout."""

  def run():
    layout = layout_of(setting, kind)
    attend = candidates.attention(setting.implementation)
    inputs = (*setting.inputs(), layout)
    density = shown(layout)
    candidate = candidates.timed(kind, density, attend, inputs, direction)
    return here.timed(
      candidate, flops=setting.flops(density, direction), density=density,
      against=_dense(setting, kind == "causal", direction),
    )  # fmt: skip

  check = kind if setting.block == 128 else f"{kind}, blocks of {setting.block}"
  rests_on = (check_attention.name(setting.head_size, check),)
  return Job(f"{setting.name} {kind} {direction}", run, rests_on)


def dense(here: Here, setting: Setting, causal: bool, direction: str) -> Job:
  """The dense rival: cuDNN on a GPU, splash attention on a TPU."""

  def run():
    density = (1 + 1 / setting.length) / 2 if causal else 1.0
    candidate = rival(here, setting, causal, direction)
    return here.timed(candidate, flops=setting.flops(density, direction))

  return Job(_dense(setting, causal, direction), run)


def rival(here, setting, causal, direction) -> Candidate:
  """Dense attention, compiled."""
  inputs = setting.inputs()
  if here.platform == "tpu":
    if causal:
      raise Unavailable("splash attention is timed with everything visible")
    return candidates.splash(inputs, direction, setting.block)
  attend = functools.partial(candidates.stock, causal=causal)
  return candidates.timed("dense", 1.0, attend, inputs, direction)


def _dense(setting: Setting, causal: bool, direction: str) -> str:
  return f"{setting.name} dense{' causal' * causal} {direction}"


def planning(here: Here, setting: Setting) -> list[Job]:
  """Choosing blocks on the device, alone and with attention."""
  slot = lambda: candidates.slot_of(setting, setting.length, DENSITY)
  plan = lambda *inputs: candidates.plan(slot())(*inputs)
  attend = candidates.attention(setting.implementation)
  forms = {
    "plan": plan,
    "plan and transposed lists": lambda *x: plan(*x).with_transpose(),
    "planned": lambda *x: attend(*x, plan(*x)),
  }

  def run(form):
    candidate = candidates.timed(
      form, DENSITY, forms[form], setting.inputs(), "forward"
    )
    return here.timed(candidate, against=f"{setting.name} top-k forward")

  check = (check_attention.name(setting.head_size, "top-k"),)
  return [
    Job(
      f"{setting.name} {form} forward", functools.partial(run, form),
      check if form == "planned" else (),
    )
    for form in forms
  ]  # fmt: skip


def lengths(here: Here) -> list[Job]:
  """Head size 128: 32k and 64k tokens, densities of a tenth and of all."""
  near, far = (
    _sized(here, Setting(f"{n}k", 1024 * n, here.kernel)) for n in (32, 64)
  )
  kinds = ("top-k",) if here.tiny else ("top-k", "causal top-k", "full")
  found = []
  for direction in DIRECTIONS:
    found.append(dense(here, near, False, direction))
    found += [ours(here, near, kind, direction) for kind in kinds]
  if here.tiny:
    causal = ours(here, near, "causal top-k", "forward")
    return [*found, causal, *planning(here, near)[-1:]]
  found += planning(here, near)
  for direction in DIRECTIONS:
    found.append(dense(here, near, True, direction))
    found.append(ours(here, near, "causal", direction))
  for direction in DIRECTIONS:
    found.append(dense(here, far, False, direction))
    found += [
      ours(here, far, kind, direction) for kind in ("top-k", "causal top-k")
    ]
  return found


def shapes(here: Here) -> list[Job]:
  """Other head sizes, grouped heads and small blocks, at 32k tokens."""
  make = functools.partial(Setting, length=32768, implementation=here.kernel)
  settings = (
    make("head size 64", head_size=64),
    make("head size 256", head_size=256, heads=16, key_heads=16),
    make("32 heads on 8", key_heads=8),
    make("blocks of 64", block=64, key_heads=8),
  )
  found = []
  for setting in settings[:1] if here.tiny else settings:
    setting = _sized(here, setting)
    for direction in DIRECTIONS[: 1 if here.tiny else 2]:
      found.append(dense(here, setting, False, direction))
      found.append(ours(here, setting, "top-k", direction))
  return found


def _sized(here: Here, setting: Setting) -> Setting:
  return setting.shrunk() if here.tiny else setting
