"""Attention that goes from sinks to the visual tokens that are none (VAR)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tokjax.attention import core
from tokjax.attention.causal import Causal, need_whole
from tokjax.layer import NOTES, Layer
from tokjax.tokens import Kind

# As in the official code.
EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class ToVisual(Causal):
  """Heads that look at the image give what sinks receive to other patches.

  A token is a sink of a layer if its hidden state, normed to a root mean square
  of one, is beyond a threshold in some dimension. Of queries behind the image,
  those heads are changed whose attention to the image is large and goes to
  visual sinks by a small part only. While decoding, the sinks of the prompt are
  used. Checked against src/logic/logic.py (98e62d6) of seilk/VisAttnSink.

  Attributes:
    keep: what a sink keeps of its attention (p).
    threshold: of the activation (tau).
    portion: the largest part of attention to the image that may go to visual
      sinks (rho).
    least: the least attention to the image.
    dims: dimensions of hidden states that tell sinks, (1415, 2533) of Llama 2
      7B and (2100, 4743) of 13B; None: all.
    spared: first and last layers that are left alone.
  """

  keep: float = 0.6
  threshold: float = 20.0
  portion: float = 0.5
  least: float = 0.2
  dims: tuple[int, ...] | None = None
  spared: tuple[int, int] = (2, 0)

  def __post_init__(self):
    for name in ("keep", "portion", "least"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f"{name}={getattr(self, name)}: must lie in [0, 1]")
    if not self.threshold > 0:
      raise ValueError(f"threshold={self.threshold}: must be above 0")
    if self.dims is not None and (not self.dims or min(self.dims) < 0):
      raise ValueError(f"dims={self.dims}: must be numbers of 0 or more")

  @property
  def needs(self) -> tuple[str, ...]:
    return ("hidden", "kind")

  @property
  def whole(self) -> bool:
    return True

  @property
  def per_head(self) -> bool:
    return True

  @property
  def leaves_notes(self) -> str:
    return "keys"

  def parameters(self, layer: Layer, width: int, key) -> None:
    """Nothing is learned; the width of hidden states is checked.

    Raises:
      ValueError: hidden states have fewer dimensions.
    """
    if self.dims is not None and max(self.dims) >= width:
      raise ValueError(
        f"dims={self.dims}: hidden states have {width} dimensions; give those"
        " of this model, or None for all"
      )

  def acts(self, layer: Layer) -> bool:
    """Whether a layer is changed."""
    return layer.is_between(*self.spared)

  def sinks(
    self, hidden: Float[Array, "b n w"], valid: Bool[Array, "b n"]
  ) -> Bool[Array, "b n"]:
    """Tokens with a massive activation."""
    x = hidden.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + EPSILON)
    if self.dims is not None:
      x = x[..., jnp.asarray(self.dims)]
    return valid & (jnp.abs(x).max(axis=-1) > self.threshold)

  def spread(
    self,
    weight: Float[Array, "b g r c n"],
    sink: Bool[Array, "b #g n"],
    visual: Bool[Array, "b #g n"],
    behind: Bool[Array, "b c"],
  ) -> Float[Array, "b g r c n"]:
    """Rows after redistribution; each has the sum that it had.

    Args:
      weight: attention.
      sink, visual: of keys.
      behind: of queries, whether they stand behind the image.
    """
    sink, visual = sink[:, :, None, None], visual[:, :, None, None]
    of = lambda which: jnp.where(which, weight, 0.0).sum(-1)
    image, held = of(visual), of(visual & sink)
    share = held / (image + EPSILON * visual.sum(-1))
    acts = (visual & sink).any(axis=-1) & (share <= self.portion)
    acts = acts & (image >= self.least) & behind[:, None, None]
    new = core.moved(weight, sink, visual & ~sink, self.keep)
    return jnp.where(acts[..., None], new, weight)

  def __call__(self, layer, arrivals, memory, *, params, carry):
    if not self.acts(layer):
      return super().__call__(
        layer, arrivals, memory, params=params, carry=carry
      )
    arrivals = arrivals.clean()
    need_whole(self, arrivals, memory)
    weights = self.weights(layer, arrivals, memory)
    valid, t = arrivals.valid, arrivals.q.shape[1]
    sink = self.sinks(arrivals.hidden, valid)
    visual = valid & (arrivals.kind == Kind.VISUAL)
    place = jnp.arange(t)
    last = jnp.where(visual, place, -1).max(axis=1, keepdims=True)
    behind = place[None] > last
    v = core.heads_first(memory.v)

    def rows(at):
      changed = self.spread(
        weights(at), sink[:, None], visual[:, None], behind[:, at]
      )
      return core.join(core.mix(changed, v))

    out = core.over_rows(rows, t)
    wide = lambda x: jnp.broadcast_to(x[:, None], (len(x), layer.kv_heads, t))
    carry = {**carry, NOTES: {"sink": wide(sink), "visual": wide(visual)}}
    return self.finish(layer, out, arrivals, params), carry

  def rescale(self, layer, weight, notes):
    if not self.acts(layer):
      return weight
    every = jnp.ones((weight.shape[0], weight.shape[3]), bool)
    return self.spread(weight, notes["sink"], notes["visual"], every)
