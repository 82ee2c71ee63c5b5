"""Changes of attention weights and outputs: sinks, gates."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from pallas_kernels import layout as layouts
from tokjax.attention import core
from tokjax.attention.causal import Causal, by_group, listed, need_whole
from tokjax.layer import Layer


def _heads(layer: Layer, heads) -> Bool[Array, "h"]:
  """Mask of the selected query heads of a layer; None: all."""
  if heads is None:
    return jnp.ones((layer.heads,), bool)
  if heads and isinstance(heads[0], tuple):
    heads = layer.ask(lambda index, depth: heads[index])
  wrong = [h for h in heads if not 0 <= h < layer.heads]
  if wrong:
    raise ValueError(
      f"heads={wrong}: layer {layer.index} has query heads 0..{layer.heads - 1}"
    )
  return jnp.zeros((layer.heads,), bool).at[jnp.asarray(heads, int)].set(True)


@dataclasses.dataclass(frozen=True)
class FirstToken(Causal):
  """Attention to the first token times gamma, rows normalised (ZeroTuning).

  Done by adding log(gamma) to its logit, which is the same.

  Attributes:
    gamma: the factor, above 0.
    heads: query heads that are tuned, for all layers or a tuple for each;
      None: all.
    layers: that are tuned; None: all.
  """

  gamma: float = 1.0
  heads: tuple | None = None
  layers: tuple[int, ...] | None = None

  def __post_init__(self):
    if not self.gamma > 0:
      raise ValueError(f"gamma={self.gamma}: must be above 0")

  @property
  def per_head(self) -> bool:
    return self.heads is not None

  def check(self, layer, prompt):
    _heads(layer, self.heads)

  def _tunes(self, index: int, depth: int) -> bool:
    return self.layers is None or index in self.layers

  def bias(self, layer, position):
    if not layer.ask(self._tunes):
      return None
    tuned = _heads(layer, self.heads)[None, :, None]
    first = by_group(layer, jnp.where(tuned, jnp.log(self.gamma), 0.0))
    return jnp.where(position[:, :, None] == 0, first, 0.0)

  def pattern(self, layer, tokens):
    return layouts.Causal()

  def by_blocks(self, layer, layout, arrivals, memory):
    """Dense attention, and then more of the first token of each text."""
    out, lse = listed(layer, layout, arrivals, memory)
    if not layer.ask(self._tunes):
      return out
    at = jnp.arange(arrivals.q.shape[1])
    first = jax.tree.map(lambda x: x[:, :1], memory)
    seen = by_group(layer, self.seen(layer, arrivals, first)(at))
    seen = seen & (first.position == 0)[:, None, None, None]
    x = self.products(layer, arrivals, first)(at)  # [b, G, r, t, 1]
    x = jnp.where(seen, x - by_group(layer, lse)[..., None], -jnp.inf)
    factor = jnp.where(_heads(layer, self.heads), self.gamma, 1.0)
    more = jnp.exp(x) * by_group(layer, (factor - 1)[None])[..., None, None]
    # Its part grows by `more`, and with it the sum that all is divided by.
    new = core.split(out, layer.kv_heads) + more * core.heads_first(first.v)[
      :, :, None
    ]
    return core.join(new / (1 + more)).astype(out.dtype)


@dataclasses.dataclass(frozen=True)
class Calibrated(Causal):
  """Takes attention from sinks beyond the first one and spreads it (ACT).

  Checked against models/llama_modelling_aug.py (a267af7). While decoding, the
  sinks found in the prompt are used (an extension: the official code works on
  whole sequences).

  Attributes:
    keep: what a sink keeps of its attention (beta).
    threshold: mean attention above which a token is a sink (alpha).
    heads: as in `FirstToken`.
    spared: first and last layers that are left alone.
  """

  keep: float = 0.4
  threshold: float = 0.1
  heads: tuple | None = None
  spared: tuple[int, int] = (2, 1)

  def __post_init__(self):
    if not 0 <= self.keep <= 1:
      raise ValueError(f"keep={self.keep}: must lie in [0, 1]")

  @property
  def whole(self) -> bool:
    return True

  @property
  def per_head(self) -> bool:
    return True

  @property
  def leaves_notes(self) -> str:
    return "keys"

  def check(self, layer, prompt):
    _heads(layer, self.heads)

  def acts(self, layer: Layer) -> bool:
    """Whether a layer is changed."""
    return layer.is_between(*self.spared)

  def sinks(
    self, layer: Layer, received: Float[Array, "b g r n"]
  ) -> Bool[Array, "b g r n"]:
    """Tokens above the threshold but for the first of them, chosen heads."""
    above = received > self.threshold
    first = jnp.cumsum(above, axis=-1) == 1
    tuned = by_group(layer, _heads(layer, self.heads)[None])[..., None]
    return above & ~first & tuned

  def spread(
    self, weight: Float[Array, "b g r c n"], sinks: Bool[Array, "b g r n"]
  ) -> Float[Array, "b g r c n"]:
    """Sinks keep a part; the rest goes to the others in proportion."""
    sinks = sinks[:, :, :, None]
    return core.moved(weight, sinks, ~sinks, self.keep)

  def __call__(self, layer, arrivals, memory, *, params, carry):
    if not self.acts(layer):
      return super().__call__(
        layer, arrivals, memory, params=params, carry=carry
      )
    arrivals = arrivals.clean()
    need_whole(self, arrivals, memory)
    weights = self.weights(layer, arrivals, memory)
    t = arrivals.q.shape[1]

    def columns(at):
      real = arrivals.valid[:, at][:, None, None, :, None]
      return jnp.where(real, weights(at), 0.0).sum(axis=3)[:, None]

    received = _summed(columns, t)
    length = arrivals.valid.sum(axis=1)[:, None]
    queries = jnp.maximum(length - jnp.arange(t)[None], 1)
    sinks = self.sinks(layer, received / queries[:, None, None])
    v = core.heads_first(memory.v)
    rows = lambda at: core.join(core.mix(self.spread(weights(at), sinks), v))
    out = core.over_rows(rows, t)
    carry = {**carry, "notes": {"sink": jnp.swapaxes(sinks, 2, 3)}}
    return self.finish(layer, out, arrivals, params), carry

  def rescale(self, layer, weight, notes):
    if not self.acts(layer):
      return weight
    return self.spread(weight, jnp.swapaxes(notes["sink"], 2, 3))


def _summed(rows, t: int) -> Array:
  """Sum of `rows(at) [b, 1, ...]` over blocks of all t query numbers."""
  if t <= core.BLOCK:
    return rows(jnp.arange(t))[:, 0]
  whole = t // core.BLOCK * core.BLOCK
  at = jnp.arange(whole).reshape(-1, core.BLOCK)
  step = lambda total, at: (total + rows(at)[:, 0], None)
  first = rows(at[0])[:, 0]
  total = jax.lax.scan(step, first, at[1:])[0]
  if whole < t:
    total = total + rows(jnp.arange(whole, t))[:, 0]
  return total


@dataclasses.dataclass(frozen=True)
class Gated(Causal):
  """Outputs of heads times a sigmoid of the attention's input.

  Gated Attention (Qiu et al., 2025), between attention and output projection.

  Attributes:
    base: the attention whose outputs are gated.
    kind: one gate a query head, or one a channel.
    with_bias: whether the gate's projection has one.
  """

  base: Causal = Causal()
  kind: Literal["headwise", "elementwise"] = "elementwise"
  with_bias: bool = False

  def __post_init__(self):
    if self.kind not in ("headwise", "elementwise"):
      raise ValueError(
        f"kind={self.kind!r}: must be 'headwise' or 'elementwise'"
      )

  @property
  def needs(self) -> tuple[str, ...]:
    return tuple(sorted({"x", *self.base.needs}))

  @property
  def whole(self) -> bool:
    return self.base.whole

  @property
  def per_head(self) -> bool:
    return self.base.per_head

  @property
  def leaves_notes(self) -> str:
    return self.base.leaves_notes

  def check(self, layer, prompt):
    self.base.check(layer, prompt)

  def parameters(
    self, layer: Layer, width: int, key: PRNGKeyArray
  ) -> dict[str, Array]:
    """`kernel` [W, H] or [W, H, D], and `bias` if there is one."""
    shape = (layer.heads,)
    if self.kind == "elementwise":
      shape = (layer.heads, layer.head_dim)
    kernel = jax.random.normal(key, (width, *shape)) * width**-0.5
    made = {"kernel": kernel}
    if self.with_bias:
      made["bias"] = jnp.zeros(shape)
    return made

  def bias(self, layer, position):
    return self.base.bias(layer, position)

  def rescale(self, layer, weight, notes):
    return self.base.rescale(layer, weight, notes)

  def finish(self, layer, out, arrivals, params):
    """The gate; what `base` does comes before it."""
    out = self.base.finish(layer, out, arrivals, params)
    return self._gate(out, arrivals, params)

  def _gate(self, out, arrivals, params):
    made = params["attend"]
    x = jnp.tensordot(arrivals.x, made["kernel"].astype(out.dtype), axes=1)
    if self.with_bias:
      x = x + made["bias"].reshape((1,) * 2 + made["bias"].shape)
    gate = jax.nn.sigmoid(x)
    return out * (gate[..., None] if self.kind == "headwise" else gate)

  def __call__(self, layer, arrivals, memory, *, params, carry):
    arrivals = arrivals.clean()
    out, carry = self.base(layer, arrivals, memory, params=params, carry=carry)
    return self._gate(out, arrivals, params), carry
