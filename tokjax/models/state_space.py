"""A small language model of selective state spaces: Mamba-2's blocks.

Dao & Gu, 2024; checked against `Mamba2ForCausalLM` of transformers on random
weights. One group of B and C, no bounds on delta. The scan is chunked: products
of matrices within a chunk, a recurrence over chunks, all in XLA.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokjax import receptive_field
from tokjax.receptive_field import Calibration


@dataclasses.dataclass(frozen=True)
class StateSpaceConfig:
  """An architecture.

  Attributes:
    vocabulary: ids there are.
    width, depth: features of a token, blocks.
    heads, head_dim: of a block; their product is its inner width.
    state: features of the state for each channel.
    kernel: taps of the causal convolution.
    chunk: tokens of a chunk of the scan.
    epsilon: of norms.
  """

  vocabulary: int
  width: int = 64
  depth: int = 2
  heads: int = 4
  head_dim: int = 32
  state: int = 16
  kernel: int = 4
  chunk: int = 64
  epsilon: float = 1e-5

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name != "epsilon" and value < 1:
        raise ValueError(f"{field.name}={value}: must be 1 or more")

  @property
  def inner(self) -> int:
    return self.heads * self.head_dim

  @property
  def mixed(self) -> int:
    """Channels that go through the convolution."""
    return self.inner + 2 * self.state


class State(NamedTuple):
  """What one block remembers of a text.

  Attributes:
    tail: last inputs of the convolution, `[b, kernel - 1, mixed]`.
    ssm: `[b, h, p, n]`.
  """

  tail: Float[Array, "b k m"]
  ssm: Float[Array, "b h p n"]


class Filter(NamedTuple):
  """LongMamba's for one block, see `receptive_field.filtered`.

  Attributes:
    calibration: of the block.
    least: retained share above which a head is filtered.
    factor: on thresholds.
  """

  calibration: Calibration
  least: float | Array
  factor: float | Array = 1.0


class Out(NamedTuple):
  """Of all blocks.

  Attributes:
    delta: steps of all tokens before any filter, `[depth, b, n, h]`.
    states: to go on from.
  """

  delta: Float[Array, "l b n h"]
  states: tuple[State, ...]


def selective_scan(
  x: Float[Array, "t h p"],
  delta: Float[Array, "t h"],
  rate: Float[Array, "h"],
  b: Float[Array, "t n"],
  c: Float[Array, "t n"],
  state: Float[Array, "h p n"],
  chunk: int = 64,
) -> tuple[Float[Array, "t h p"], Float[Array, "h p n"]]:
  """s <- exp(delta rate) s + delta x b', y = s c; outputs and the last state.

  Args:
    x: inputs of each head.
    delta: steps, 0 or more; at 0 a token changes nothing.
    rate: of decay, negative.
    b, c: how tokens are written and read.
    state: before the first token.
    chunk: tokens whose pairs are computed at a time.
  """
  t = len(x)
  chunk = min(chunk, t)
  causal = np.tril(np.ones((chunk, chunk), bool))[..., None]

  def cut(x):
    x = jnp.pad(x, [(0, -t % chunk)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, chunk, *x.shape[1:])

  def step(state, part):
    x, delta, b, c = part
    total = jnp.cumsum(delta * rate[None], axis=0)
    gap = jnp.where(causal, total[:, None] - total[None], -jnp.inf)
    weight = (c @ b.T)[..., None] * jnp.exp(gap) * delta[None]
    y = jnp.einsum("ijh,jhp->ihp", weight, x)
    y += jnp.exp(total)[..., None] * jnp.einsum("in,hpn->ihp", c, state)
    left = jnp.exp(total[-1:] - total) * delta
    new = jnp.einsum("jh,jhp,jn->hpn", left, x, b)
    return jnp.exp(total[-1])[:, None, None] * state + new, y

  state, y = jax.lax.scan(step, state, tuple(map(cut, (x, delta, b, c))))
  return y.reshape(-1, *y.shape[2:])[:t], state


def _norm(scale, x, epsilon):
  mean = jnp.square(x).mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(mean + epsilon) * scale[(None,) * (x.ndim - 1)]


class Block(nn.Module):
  """Norm, projection, convolution, scan, gated norm, projection, residual.

  Attributes:
    config: the architecture.
  """

  config: StateSpaceConfig

  @nn.compact
  def __call__(
    self,
    hidden: Float[Array, "b n d"],
    valid: Bool[Array, "b n"],
    state: State,
    filter: Filter | None,
  ) -> tuple[Float[Array, "b n d"], State, Float[Array, "b n h"]]:
    cfg = self.config
    ones, log = nn.initializers.ones, jnp.log
    bare = _norm(
      self.param("norm", ones, (cfg.width,)), hidden, cfg.epsilon
    )
    sizes = np.cumsum([cfg.inner, cfg.mixed])
    z, mixed, delta = jnp.split(
      nn.Dense(
        cfg.inner + cfg.mixed + cfg.heads, use_bias=False, name="in_proj"
      )(bare),
      sizes, axis=-1,
    )  # fmt: skip
    mixed, tail = self._convolved(mixed, valid, state.tail)
    x, b, c = jnp.split(mixed, sizes[:1].tolist() + [cfg.inner + cfg.state], -1)
    x = x.reshape(*x.shape[:2], cfg.heads, cfg.head_dim)
    bias = self.param("delta_bias", _delta_bias, (cfg.heads,))
    delta = jax.nn.softplus(delta + bias[None, None])
    spread = lambda key, shape: log(jax.random.uniform(key, shape, None, 1, 16))
    rate = -jnp.exp(self.param("log_rate", spread, (cfg.heads,)))
    kept = delta
    if filter is not None:
      kept = jax.vmap(
        lambda d, n: receptive_field.filtered(
          d, n, filter.calibration, least=filter.least, factor=filter.factor
        )
      )(delta, valid.sum(axis=1))
    kept = jnp.where(valid[..., None], kept, 0.0)
    y, ssm = jax.vmap(
      lambda x, d, b, c, s: selective_scan(x, d, rate, b, c, s, cfg.chunk)
    )(x, kept, b, c, state.ssm)
    skip = self.param("skip", ones, (cfg.heads,))
    y = (y + x * skip[None, None, :, None]).reshape(*z.shape)
    scale = self.param("gate_norm", ones, (cfg.inner,))
    y = _norm(scale, y * nn.silu(z), cfg.epsilon)
    out = nn.Dense(cfg.width, use_bias=False, name="out_proj")(y)
    return hidden + out, State(tail, ssm), delta

  def _convolved(self, x, valid, tail):
    """A causal convolution by channel, SiLU; and the inputs for the next."""
    k = self.config.kernel
    init = nn.initializers.lecun_normal()
    taps = self.param("conv", init, (k, self.config.mixed))
    bias = self.param("conv_bias", nn.initializers.zeros, (x.shape[-1],))
    whole = jnp.concatenate([tail, jnp.where(valid[..., None], x, 0.0)], axis=1)
    n = x.shape[1]
    y = sum(whole[:, i : i + n] * taps[i][None, None] for i in range(k))
    last = jax.vmap(
      lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, k - 1)
    )(whole, valid.sum(axis=1))
    return nn.silu(y + bias[None, None]), last


def _delta_bias(key, shape):
  """Inverse softplus of steps from 0.001 to 0.1, log-uniform."""
  low, high = np.log(1e-3), np.log(1e-1)
  step = jnp.exp(jax.random.uniform(key, shape, None, low, high))
  return step + jnp.log(-jnp.expm1(-step))


class StateSpace(nn.Module):
  """Embedding, blocks, norm, and the embedding as the head.

  Attributes:
    config: the architecture.
  """

  config: StateSpaceConfig

  @nn.compact
  def __call__(
    self,
    token: Int[Array, "b n"],
    valid: Bool[Array, "b n"] | None = None,
    *,
    states: tuple[State, ...] | None = None,
    filters: tuple[Filter, ...] | None = None,
  ) -> tuple[Float[Array, "b n v"], Out]:
    """Logits, and what blocks did.

    Args:
      token: ids, padding last.
      valid: real tokens; None: all.
      states: of the text so far, `Out.states` of an earlier call; None: a text
        begins.
      filters: one for each block, for prompts; None: nothing is skipped.

    Raises:
      ValueError: there are not as many states or filters as blocks.
    """
    cfg = self.config
    for name, given in (("states", states), ("filters", filters)):
      if given is not None and len(given) != cfg.depth:
        raise ValueError(
          f"{name}: {len(given)} given, must be one for each of the"
          f" {cfg.depth} blocks"
        )
    valid = jnp.ones(token.shape, bool) if valid is None else valid
    states = self.start(len(token)) if states is None else states
    embed = nn.Embed(cfg.vocabulary, cfg.width, name="embed")
    x, after, deltas = embed(token), [], []
    for i in range(cfg.depth):
      filter = None if filters is None else filters[i]
      x, state, delta = Block(cfg, name=f"block_{i}")(
        x, valid, states[i], filter
      )
      after.append(state)
      deltas.append(delta)
    scale = self.param("norm", nn.initializers.ones, (cfg.width,))
    logits = embed.attend(_norm(scale, x, cfg.epsilon))
    return logits, Out(jnp.stack(deltas), tuple(after))

  def start(self, batch: int) -> tuple[State, ...]:
    """States of texts that begin."""
    cfg = self.config
    tail = jnp.zeros((batch, cfg.kernel - 1, cfg.mixed))
    ssm = jnp.zeros((batch, cfg.heads, cfg.head_dim, cfg.state))
    return (State(tail, ssm),) * cfg.depth


def rates(params: dict) -> list[Float[Array, "h"]]:
  """Rates of decay of every block, from the parameters of a `StateSpace`."""
  blocks = [name for name in params if name.startswith("block_")]
  blocks.sort(key=lambda name: int(name.split("_")[1]))
  return [-jnp.exp(params[name]["log_rate"]) for name in blocks]
