"""A recipe in a host: each program is compiled once and used by many laws."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.contract import hosts, probes
from tests.contract.hosts import VisionHost
from tokjax import recipes
from tokjax.slots import Slots
from tokjax.tokens import Tokens

BATCH = 3
KEY = jax.random.key
_EVENT = "/jax/core/compile/backend_compile_duration"
_compiled: list[float] = []


def _count(event: str, duration: float, **_) -> None:
  if event == _EVENT:
    _compiled.append(duration)


jax.monitoring.register_event_duration_secs_listener(_count)


def compilations() -> int:
  """How many programs this process has compiled so far."""
  return len(_compiled)


@functools.lru_cache(maxsize=4)
def case(recipe: str, host: str) -> "Case":
  """The shared case of a recipe in a host.

  Tests of a recipe follow each other; the programs of earlier ones are let go.
  """
  (found,) = [h for h in hosts.HOSTS if h.name == host]
  return Case(recipe, found)


@dataclasses.dataclass
class Case:
  """The programs of one recipe in one host, and what they returned."""

  recipe: str
  host: VisionHost

  @functools.cached_property
  def slots(self) -> Slots:
    return recipes.get(self.recipe, keep=hosts.KEEP)

  @property
  def stays(self) -> bool:
    """Whether every token leaves the model again: plans are undone."""
    return all(r.back is not None for r in self.slots.reduce)

  @property
  def around(self) -> bool:
    """Whether a plan is undone within its block, so that plans do not chain."""
    return any(r.around for r in self.slots.reduce)

  @property
  def bare(self) -> Slots:
    """What is left of the recipe where `keep` has nothing to remove.

    Its own parameters may stay: low-rank updates, a learned attention.
    """
    attend = self.slots.attend
    attend = None if hasattr(attend, "with_keep") else attend
    return Slots(attend=attend, adapter_rank=self.slots.adapter_rank)

  @property
  def takes_mask(self) -> bool:
    return not self.slots.complete

  @functools.cached_property
  def model(self):
    return self.host.build(self.slots)

  @functools.cached_property
  def params(self) -> dict[str, Any]:
    return self.host.params(self.model)

  @functools.cached_property
  def images(self) -> jax.Array:
    return self.host.images(BATCH)

  def forward(self, params, images, key) -> dict[str, Any]:
    """Output and tokens."""
    output, out = self.model.apply({"params": params}, images, key=key)
    return {"output": output, "tokens": vars(out["tokens"])}

  def probed(self, params, images, key) -> dict[str, Any]:
    """Output, tokens and what every plan says of itself."""
    output, out = self.model.apply({"params": params}, images, key=key)
    plans = [plan for made in out["plans"] for plan in made]
    return {
      "output": output,
      "tokens": vars(out["tokens"]),
      "plans": [probes.probe(plan) for plan in plans],
      "whole": probes.compose(plans) if plans and not self.around else None,
    }

  @functools.cached_property
  def batch(self):
    return jax.jit(self.probed)

  def run(self, images: jax.Array, seed: int = 0) -> dict[str, Any]:
    """Results of the batch program."""
    return jax.device_get(self.batch(self.params, images, KEY(seed)))

  @functools.cached_property
  def clean(self) -> dict[str, Any]:
    """Of `images`; counts the compilations of two calls on the way."""
    args = self.params, self.images, KEY(0)
    other = self.params, self.images[::-1] + 1, KEY(5)
    before = compilations()
    results = jax.block_until_ready(self.batch(*args))
    jax.block_until_ready(self.batch(*other))
    self.compiled = compilations() - before
    return jax.device_get(results)

  @functools.cached_property
  def single(self):
    """The program of a batch of one."""
    return jax.jit(self.forward)

  @functools.cached_property
  def encode(self):
    """The encoder alone, forward and backward: (tokens, gradients)."""
    encoder = self.host.encoder(self.slots)

    def run(params, tokens, key, grid):
      def loss(params, x):
        variables = {"params": params["encoder"]}
        given = tokens.replace(x=x)
        out, _ = encoder.apply(variables, given, grid=grid, key=key)
        x = out.x if out.mask is None else masked(out.x, out.mask)
        return jnp.sum(x**2), out

      grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
      gradients, out = grad(params, tokens.x)
      return vars(out), gradients

    return jax.jit(run, static_argnames="grid")

  @functools.cached_property
  def padding(self) -> "Padding":
    return Padding.of(self.host)

  def padded(self, garbage: float) -> tuple[dict[str, Any], Any]:
    """The padded batch, with `garbage` where nothing is real."""
    tokens = self.padding.batch
    x = jnp.where(tokens.mask[..., None], tokens.x, jnp.float32(garbage))
    tokens = tokens.replace(x=x)
    out = self.encode(self.params, tokens, KEY(0), self.host.config.grid)
    return jax.device_get(out)

  @functools.cached_property
  def with_nan(self) -> tuple[dict[str, Any], Any]:
    return self.padded(np.nan)

  @functools.cached_property
  def alone(self) -> tuple[dict[str, Any], Any]:
    """The first two examples of the padded batch without their padding.

    All their tokens where the recipe takes no padding: parameters may be tied
    to the number of tokens.
    """
    tokens, grid = self.padding.alone, Padding.GRID
    if not self.takes_mask:
      tokens = self.host.tokens(2, self.host.config.num_patches)
      grid = self.host.config.grid
    return jax.device_get(self.encode(self.params, tokens, KEY(0), grid))


def masked(x, mask):
  return jnp.where(mask[..., None], x, 0.0)


@dataclasses.dataclass(frozen=True)
class Padding:
  """Padded examples, and two of them alone.

  Rows of `batch`: padded at the end, padded anywhere, not padded, one real
  patch, none. `alone` holds the real tokens of the first two, nothing else.
  """

  batch: Tokens
  alone: Tokens

  GRID = (6, 8)
  REAL = 48

  @classmethod
  def of(cls, host: VisionHost) -> "Padding":
    p, patches = host.protected, host.config.num_patches
    tokens = host.tokens(5, patches)
    rng = np.random.default_rng(11)
    mask = np.zeros((5, patches), bool)
    mask[0, : cls.REAL] = True
    mask[1, np.sort(rng.permutation(patches)[: cls.REAL])] = True
    mask[2] = True
    mask[3, patches // 3] = True
    mask = np.concatenate([np.ones((5, p), bool), mask], axis=1)

    def real(values):
      return jnp.stack([values[i][mask[i]] for i in range(2)])

    alone = Tokens(
      real(tokens.x),
      real(tokens.size),
      real(tokens.position),
      real(tokens.kind),
    )
    return cls(tokens.replace(mask=jnp.asarray(mask)), alone)
