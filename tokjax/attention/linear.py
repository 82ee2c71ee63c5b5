"""Linear attention with decay: no softmax, and a state instead of a cache.

Lightning Attention-2 (Qin et al., 2024), checked against
lightning_attn/ops/triton/lightning_attn2.py and examples/module/tnl_attn.py
(d15c385). A token's own product is not decayed. Decay is all that is known of
distances: queries and keys are not rotated.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pallas_kernels import linear_attention
from tokjax.attention.causal import Causal
from tokjax.layer import Arrivals, Layer
from tokjax.slots import Bytes

EPSILON = 1e-5  # Of the layer norm, as in the official module.


def slopes(heads: int) -> tuple[float, ...]:
  """ALiBi's slopes: powers of 2^(-8 / heads), for any number of heads."""
  power = 2 ** int(math.log2(heads))
  found = [2 ** (-8 * (h + 1) / power) for h in range(power)]
  if power < heads:
    found += slopes(2 * power)[::2][: heads - power]
  return tuple(found)


@dataclasses.dataclass(frozen=True)
class Linear(Causal):
  """o_t = q_t . sum_s decay^(t - s) k_s v_s, head by head.

  Attributes:
    silu: whether queries, keys and values go through SiLU first.
    norm: whether the outputs of all heads together go through a layer norm,
      with a learned scale and bias.
    gate_rank: of the output gate sigmoid(x A B); 0: no gate.
    block: tile length.
    rotate: whether queries and keys are rotated to their positions, after SiLU.
  """

  silu: bool = True
  norm: bool = True
  gate_rank: int = 0
  block: int = 64
  rotate: bool = False

  @property
  def needs(self) -> tuple[str, ...]:
    return ("x",) if self.gate_rank else ()

  @property
  def whole(self) -> bool:
    # Without the state of earlier chunks; `LinearState` takes chunks.
    return True

  def check(self, layer, prompt):
    if layer.window is not None or layer.soft_cap is not None:
      raise ValueError(
        "linear attention has neither a window nor a soft cap; use another"
        " attention in layers that do"
      )

  def parameters(
    self, layer: Layer, width: int, key: PRNGKeyArray
  ) -> dict[str, Array] | None:
    """`scale` and `bias` of the norm, `down` and `up` of the gate, if any."""
    heads, made = (layer.heads, layer.head_dim), {}
    if self.norm:
      made = {"scale": jnp.ones(heads), "bias": jnp.zeros(heads)}
    if self.gate_rank:
      a, b = jax.random.split(key)
      up = jax.random.normal(b, (self.gate_rank, *heads))
      made["down"] = (
        jax.random.normal(a, (width, self.gate_rank)) * width**-0.5
      )
      made["up"] = up * self.gate_rank**-0.5
    return made or None

  def log_decay(self, layer: Layer) -> Float[Array, "h"]:
    """Of each head: less decay in higher layers."""
    height = 1 - layer.number / max(layer.depth - 1, 1) + 1e-5
    return -height * jnp.asarray(slopes(layer.heads))

  def features(self, layer: Layer, a: Arrivals):
    """Queries, keys and values as they meet; zeros in padding."""
    act = jax.nn.silu if self.silu else lambda x: x
    q, k, v = (act(x) for x in (a.q, a.k, a.v))
    if self.rotate:
      q, k = layer.rotate(q, a.position), layer.rotate(k, a.position)
    return q, k, v

  def finish(self, layer, out, arrivals, params):
    """Norm and gate."""
    made = params.get("attend", {})
    if self.norm:
      x = out.astype(jnp.float32)
      x = x - x.mean(axis=(-2, -1), keepdims=True)
      variance = jnp.square(x).mean(axis=(-2, -1), keepdims=True)
      x = x * jax.lax.rsqrt(variance + EPSILON)
      scale, bias = made["scale"][None, None], made["bias"][None, None]
      out = (x * scale + bias).astype(out.dtype)
    if self.gate_rank:
      x = jnp.tensordot(arrivals.x, made["down"].astype(out.dtype), axes=1)
      x = jnp.tensordot(x, made["up"].astype(out.dtype), axes=1)
      out = out * jax.nn.sigmoid(x)
    return out

  def attention(self, layer, arrivals, state):
    """Outputs before `finish`, from what came before (None: nothing)."""
    q, k, v = self.features(layer, arrivals)
    return linear_attention(
      q, k, v, log_decay=self.log_decay(layer), initial_state=state,
      block=self.block,
    )  # fmt: skip

  def __call__(self, layer, arrivals, memory, *, params, carry):
    del memory  # The whole prompt arrives at once.
    a = arrivals.clean()
    out = self.attention(layer, a, None)
    return self.finish(layer, out, a, params), carry


@dataclasses.dataclass(frozen=True)
class LinearState:
  """The cache of `Linear`: one matrix per head for any length."""

  needs: tuple[str, ...] = ()

  def check(self, layer, attend, prompt: int, decode: int) -> None:
    """Only linear attention has such a state."""
    if not isinstance(attend, Linear):
      raise ValueError(
        f"LinearState holds sums of k v^T, which {type(attend).__name__} cannot"
        " read; use attend=Linear() or another cache"
      )

  def parameters(self, layer: Layer, width: int, key: PRNGKeyArray) -> None:
    """Nothing is learned."""

  def init(self, layer, batch: int, prompt: int, decode: int):
    shape = (batch, layer.heads, layer.head_dim, layer.head_dim)
    return jnp.zeros(shape, jnp.float32)

  def prefill(
    self, layer, state, arrivals, *, attend, params, carry, last: bool
  ):
    """A chunk; padding behind it neither adds to the state nor decays it."""
    a = arrivals.clean()
    out = attend.attention(layer, a, state)
    state = _added(attend, layer, state, a)
    return attend.finish(layer, out, a, params), state, carry

  def decode(self, layer, state, arrivals, *, attend, params, carry):
    return self.prefill(
      layer, state, arrivals, attend=attend, params=params, carry=carry,
      last=True,
    )  # fmt: skip

  def bytes(self, layer, state) -> Bytes:
    one = state[0].size * state.dtype.itemsize
    return Bytes(
      jnp.full(state.shape[:1], one, jnp.float32), one * state.shape[0]
    )


def _added(attend: Linear, layer: Layer, state, a: Arrivals):
  """The state after the real tokens of a chunk."""
  _, k, v = attend.features(layer, a)
  k, v = (
    jnp.repeat(jnp.swapaxes(x, 1, 2), layer.group, axis=1).astype(jnp.float32)
    for x in (k, v)
  )
  decay = attend.log_decay(layer)[None, :, None]
  count = a.valid.sum(axis=1)[:, None, None]
  since = count - 1 - jnp.arange(a.valid.shape[1])[None, None]
  weight = jnp.where(since >= 0, jnp.exp(decay * jnp.maximum(since, 0)), 0.0)
  new = jnp.einsum("bht,bhtd,bhte->bhde", weight, k, v)
  return jnp.exp(decay * count)[..., None] * state + new
