"""One small run of every cache and attention recipe, shared by all tests.

Random queries, keys and values go through the contract directly: no decoder is
needed. Three prompts of different lengths are padded, with NaN, to one shape
and prefilled (in two chunks where the method allows it); then some tokens are
decoded. Everything is one compilation a recipe.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import recipes
from tokjax.attention.causal import Causal
from tokjax.cache.kv import KV
from tokjax.layer import Arrivals, Layer
from tokjax.slots import Slots, parameters

QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}
LENGTHS = (32, 21, 9)
PROMPT, STEPS, DEPTH, HEADS, GROUPS, WIDTH, INPUT = 32, 7, 2, 4, 2, 8, 16
IDS = 11
# Before this step there is one that is not valid.
PAUSE = 3
KEEP = 0.5

# Options that are too large for prompts of 32 tokens, by name and kind.
SMALL = {
  "first": 2,
  "window": 4,
  "kernel": 3,
  "page": 4,
  "least": 1,
  "from_layer": 1,
  "future": 5,
  "layers": (0,),
  "local": 6,
  "chunk": 4,
  "representatives": 2,
  "tokens": (3, 7),
  "block": 4,
  "group": 4,
  "residual": 8,
  "gap": 4,
  "queries": 4,
  "sinks": 2,
  "near": 3,
  "least_vertical": 2,
  "least_slash": 3,
  "stride": 2,
  "mass": 0.6,
  "separators": 3,
  "spared": (0, 1),
  "gate_rank": 3,
  "slots": 6,
  "slack": 0,
  "leaders": ((0, 0), (0, 1)),
  "recent": 5,
  "newest": 1,
  "buffer": 4,
  "densities": (1.0, 3.0),
  "exact": 3,
  "apart": 2,
  "chunks_per_block": 1,
  "certainty": -0.2,
  "activation": 1.8,
  "part": 4,
  "hidden": 5,
  "state": 3,
}


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotates pairs (i, i + d / 2)."""

  base: float = 100.0

  def __call__(self, x, position):
    half = x.shape[-1] // 2
    rate = self.base ** (-np.arange(half, dtype=np.float32) / half)
    angle = position[..., None, None].astype(jnp.float32) * jnp.asarray(
      rate
    ).reshape((1,) * (position.ndim + 1) + (-1,))
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

  def tables(self, features, position):
    ones = jnp.ones((*position.shape, 1, features // 2))
    both = self(jnp.concatenate([ones, 0 * ones], -1), position)[..., 0, :]
    cos, sin = jnp.split(both, 2, axis=-1)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


def layers() -> tuple[Layer, ...]:
  return tuple(
    Layer(i, DEPTH, HEADS, GROUPS, WIDTH, Rope()) for i in range(DEPTH)
  )


def options_of(name: str) -> dict[str, Any]:
  """The recipe's options that have to be small, made so."""
  import inspect

  found = inspect.signature(recipes.find(name).build).parameters
  small = {}
  for option, parameter in found.items():
    if option in SMALL and isinstance(parameter.default, type(SMALL[option])):
      small[option] = SMALL[option]
  return small


def names() -> tuple[str, ...]:
  return recipes.names("cache") + recipes.names("llm")


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
  """What all tokens, of prompts and generated, bring to every layer.

  Arrays `[depth, b, PROMPT + STEPS, ...]`; an example's generated tokens
  follow its prompt directly.
  """

  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  x: np.ndarray
  token: np.ndarray

  @classmethod
  def random(cls) -> "Text":
    rng = np.random.default_rng(3)
    n, b = PROMPT + STEPS, len(LENGTHS)
    draw = lambda *s: rng.normal(size=(DEPTH, b, n, *s)).astype(np.float32)
    return cls(
      # Longer queries, so that attention is not uniform.
      2 * draw(HEADS, WIDTH),
      draw(GROUPS, WIDTH),
      draw(GROUPS, WIDTH),
      draw(INPUT),
      rng.integers(0, IDS, size=(b, n)),
    )

  def with_far(self, tokens: int) -> "Text":
    """The first tokens have other values."""
    v = self.v.copy()
    v[:, :, :tokens] += 100.0
    return dataclasses.replace(self, v=v)

  def prompt(self, layer: int, start: int, stop: int, garbage=np.nan):
    """Arrivals of the slots start..stop of the padded prompts."""
    valid = np.arange(start, stop)[None] < np.asarray(LENGTHS)[:, None]

    def cut(x):
      x = x[layer][:, start:stop]
      return np.where(
        valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, garbage
      )

    position = np.broadcast_to(np.arange(start, stop), valid.shape)
    token = np.where(valid, self.token[:, start:stop], 0)
    return Arrivals(
      *map(jnp.asarray, (cut(self.q), cut(self.k), cut(self.v), position,
                         valid, token, cut(self.x)))
    )  # fmt: skip

  def step(self, layer: int, i: int):
    """Arrivals of the generated token i."""
    at = np.asarray(LENGTHS) + i
    pick = lambda x: jnp.asarray(
      np.stack([x[b, at[b] : at[b] + 1] for b in range(len(LENGTHS))])
    )
    of = lambda x: pick(x[layer])
    return Arrivals(
      of(self.q), of(self.k), of(self.v), jnp.asarray(at[:, None]),
      jnp.ones((len(LENGTHS), 1), bool), pick(self.token), of(self.x),
    )  # fmt: skip


TEXT = Text.random()


def nothing(arrivals: Arrivals, garbage) -> Arrivals:
  """A step in which no example takes part; it must change nothing."""
  bad = lambda x: (
    jnp.full_like(x, garbage) if jnp.issubdtype(x.dtype, jnp.floating) else x
  )
  none = jnp.zeros_like(arrivals.valid)
  return dataclasses.replace(jax.tree.map(bad, arrivals), valid=none)


@functools.lru_cache(maxsize=8)
def _program(case: "Case"):
  return jax.jit(case.life, compiler_options=QUICK)


@dataclasses.dataclass(frozen=True)
class Case:
  """A recipe's slots, what they returned, and what is left."""

  name: str
  slots: Slots
  depth: int = DEPTH
  dtype: Any = jnp.float32
  window: int | tuple[int, ...] | None = None
  text: Text = TEXT

  @property
  def layers(self) -> tuple[Layer, ...]:
    """The first `depth` of the layers."""
    windows = self.window
    if not isinstance(windows, tuple):
      windows = (windows,) * DEPTH
    of = lambda layer: dataclasses.replace(
      layer, dtype=self.dtype, window=windows[layer.index]
    )
    return tuple(of(layer) for layer in layers()[: self.depth])

  @property
  def attend(self) -> Any:
    return Causal() if self.slots.attend is None else self.slots.attend

  @property
  def cache(self) -> Any:
    return KV() if self.slots.cache is None else self.slots.cache

  @property
  def chunks(self) -> tuple[tuple[int, int], ...]:
    if self.attend.whole:
      return ((0, PROMPT),)
    return ((0, PROMPT // 2), (PROMPT // 2, PROMPT))

  def params(self, layer: Layer):
    key = jax.random.fold_in(jax.random.key(5), layer.index)
    return parameters(self.attend, self.cache, layer, INPUT, key)

  def arguments(self, garbage=np.nan):
    prompts = [
      [self.text.prompt(i, *chunk, garbage) for i in range(self.depth)]
      for chunk in self.chunks
    ]
    steps = []
    for i in range(self.depth):
      real = [self.text.step(i, s) for s in range(STEPS)]
      real.insert(PAUSE, nothing(real[0], garbage))
      steps.append(jax.tree.map(lambda *x: jnp.stack(x), *real))
    return prompts, steps, [self.params(layer) for layer in self.layers]

  def life(self, prompts, steps, params):
    """Outputs of prefill and of the steps, last states and first ones."""
    attend, cache = self.attend, self.cache
    states = [
      cache.init(layer, len(LENGTHS), PROMPT, STEPS) for layer in self.layers
    ]
    outs = []
    for n, chunk in enumerate(prompts):
      carry, part = {}, []
      for i, layer in enumerate(self.layers):
        out, states[i], carry = cache.prefill(
          layer, states[i], chunk[i], attend=attend, params=params[i],
          carry=carry, last=n == len(prompts) - 1,
        )  # fmt: skip
        part.append(out)
      outs.append(jnp.stack(part))
    start = list(states)

    def step(states, arrivals):
      carry, outs, states = {}, [], list(states)
      for i, layer in enumerate(self.layers):
        out, states[i], carry = cache.decode(
          layer, states[i], arrivals[i], attend=attend, params=params[i],
          carry=carry,
        )  # fmt: skip
        outs.append(out[:, 0])
      return states, jnp.stack(outs)

    states, decoded = jax.lax.scan(step, states, steps)
    logical = [
      cache.bytes(layer, s).logical
      for layer, s in zip(self.layers, states, strict=True)
    ]
    return jnp.concatenate(outs, axis=2), decoded, start, states, logical

  @property
  def program(self):
    """Compiled once, whatever the text."""
    return _program(dataclasses.replace(self, text=TEXT))

  @functools.cached_property
  def result(self):
    """Outputs in NumPy; states stay as they are."""
    return self.run(np.nan)

  def run(self, garbage):
    prefilled, decoded, start, states, logical = self.program(
      *self.arguments(garbage)
    )
    prefilled, decoded = jax.device_get((prefilled, decoded))
    outs = prefilled, np.delete(decoded, PAUSE, axis=0)
    return *outs, start, states, jax.device_get(logical)

  @property
  def prefilled(self) -> np.ndarray:
    """`[depth, b, PROMPT, H, D]`."""
    return self.result[0]

  @property
  def decoded(self) -> np.ndarray:
    """`[steps, depth, b, H, D]`."""
    return self.result[1]


def held(slots: Slots, layer: Layer, prompt: int, steps: int) -> list:
  """Shapes of what one layer holds behind a prompt, for so many steps."""
  attend = Causal() if slots.attend is None else slots.attend
  cache = KV() if slots.cache is None else slots.cache
  zeros = lambda *more: jnp.zeros((1, prompt, *more))

  def run(key):
    kv, at = zeros(layer.kv_heads, layer.head_dim), zeros().astype(jnp.int32)
    q, valid = zeros(layer.heads, layer.head_dim), jnp.ones(at.shape, bool)
    arrivals = Arrivals(q, kv, kv, at, valid, at, zeros(INPUT))
    _, state, _ = cache.prefill(
      layer, cache.init(layer, 1, prompt, steps), arrivals, attend=attend,
      params=parameters(attend, cache, layer, INPUT, key), carry={}, last=True,
    )  # fmt: skip
    return jax.tree.leaves(state)

  return jax.eval_shape(run, jax.random.key(0))


@functools.cache
def case(name: str, **options) -> Case:
  """The shared case of a recipe, at half of everything."""
  options = {**options_of(name), **options}
  return Case(name, recipes.get(name, keep=KEEP, **options))
