"""A recipe in a vision transformer."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.contract import hosts, probes
from tests.contract.case import BATCH, KEY, Case
from tests.contract.hosts import VisionHost
from tokjax.slots import Slots
from tokjax.tokens import Tokens


class VisionCase(Case):
  """Results: "output", "tokens" and, of batches, "plans" and "whole"."""

  host: VisionHost

  @property
  def output_shape(self) -> tuple[int, ...]:
    return (BATCH, self.host.config.num_classes)

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

  @property
  def other_inputs(self) -> jax.Array:
    return self.inputs[::-1] + 1

  @property
  def nan_inputs(self) -> tuple[Any, Any]:
    return self.params, self.inputs.at[1, 5, 5].set(jnp.nan)

  @functools.cached_property
  def single(self):
    """The program of a batch of one."""
    return jax.jit(self.forward)

  def loss(self, params, x, tokens, key, grid) -> tuple[jax.Array, Tokens]:
    """A loss of the encoder alone, and its tokens."""
    encoder = self.host.encoder(self.slots)
    variables = {"params": params["encoder"]}
    given = tokens.replace(x=x)
    out, _ = encoder.apply(variables, given, grid=grid, key=key)
    x = out.x if out.mask is None else masked(out.x, out.mask)
    return jnp.sum(x**2), out

  @functools.cached_property
  def differentiate(self):
    """The encoder alone, forward and backward: (tokens, gradients)."""

    def run(params, tokens, key, grid):
      grad = jax.grad(self.loss, argnums=(0, 1), has_aux=True)
      gradients, out = grad(params, tokens.x, tokens, key, grid)
      return vars(out), gradients

    return jax.jit(run, static_argnames="grid")

  @functools.cached_property
  def encode(self):
    """The encoder alone, forward: tokens."""

    def run(params, tokens, key, grid):
      return vars(self.loss(params, tokens.x, tokens, key, grid)[1])

    return jax.jit(run, static_argnames="grid")

  @functools.cached_property
  def padding(self) -> "Padding":
    return Padding.of(self.host)

  def padded(self, garbage: float) -> tuple[dict[str, Any], Any]:
    """The padded batch, with `garbage` where nothing is real; gradients.

    The laws of gradients are held in one host; in others they are None.
    """
    tokens = self.padding.batch
    x = jnp.where(tokens.mask[..., None], tokens.x, jnp.float32(garbage))
    args = self.params, tokens.replace(x=x), KEY(0), self.host.config.grid
    if self.host != hosts.taking(self.recipe, VisionHost)[-1]:
      return jax.device_get(self.encode(*args)), None
    return jax.device_get(self.differentiate(*args))

  @functools.cached_property
  def with_nan(self) -> tuple[dict[str, Any], Any]:
    return self.padded(np.nan)

  @functools.cached_property
  def alone(self) -> dict[str, Any]:
    """The first two examples of the padded batch without their padding."""
    tokens, grid = self.padding.alone, Padding.GRID
    return jax.device_get(self.encode(self.params, tokens, KEY(0), grid))

  @functools.cached_property
  def gradients(self) -> Any:
    """Of parameters and tokens; padding is not among them."""
    if self.takes_mask:
      # Compiled already: the padded batch, all of it real.
      tokens = self.padding.batch
      tokens = tokens.replace(mask=jnp.ones_like(tokens.mask))
    else:
      tokens = self.host.tokens(2, self.host.config.num_patches)
    grid = self.host.config.grid
    return jax.device_get(
      self.differentiate(self.params, tokens, KEY(0), grid)[1]
    )

  def padded_and_alone(self) -> Iterator[tuple[dict, dict]]:
    padded, alone = self.with_nan[0], self.alone
    names = ("x", "size", "position", "kind")
    # Noise belongs to places, so a random recipe sees the same only where the
    # padding comes last.
    for i in range(1 if self.slots.needs_key else 2):
      few = padded["mask"][i]
      there = np.ones(alone["x"].shape[1], bool)
      if alone["mask"] is not None:
        there = alone["mask"][i]
      yield (
        {name: padded[name][i][few] for name in names},
        {name: alone[name][i][there] for name in names},
      )

  def with_garbage(self) -> tuple[dict, dict]:
    nan, huge = self.with_nan[0], self.padded(1e30)[0]
    real = nan["mask"][..., None]
    return (
      {"x": np.where(real, nan["x"], 0)},
      {"x": np.where(huge["mask"][..., None], huge["x"], 0)},
    )

  def keeping_all(self) -> tuple[dict, dict] | None:
    tokens, valid = run_all(
      self.host, self.host.slots(self.recipe, 1.0), self.params
    )
    if valid and not np.concatenate(valid, axis=1).all():
      # An adaptive method: room for all is no order to keep all.
      assert tokens["mask"] is not None
      return None
    tokens = {**tokens, "mask": None}
    if self.bare == Slots():
      return tokens, plain(self.host)
    return tokens, run_all(self.host, self.bare, self.params)[0]


def run_all(host: VisionHost, slots: Slots, params) -> tuple[dict, list]:
  """Tokens of one image, and which outputs of each plan are valid."""
  model = host.build(slots)

  def forward(params, images, key):
    _, out = model.apply({"params": params}, images, key=key)
    valid = [p.valid for made in out["plans"] for p in made]
    return vars(out["tokens"]), [v for v in valid if v is not None]

  return jax.jit(forward)(params, host.inputs(BATCH)[:1], KEY(0))


@functools.cache
def plain(host: VisionHost) -> dict:
  """Tokens without a recipe; parameters follow from their names alone."""
  return run_all(host, Slots(), host.params(host.build(Slots())))[0]


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
