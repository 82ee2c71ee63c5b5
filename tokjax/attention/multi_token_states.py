"""Keys and values that stand for chunks of tokens (Attamba, 2024).

A key is the layer's input plus what a state-space model makes of it, likewise a
value; there are no projections of keys and values. The model starts anew with
every chunk, so that the last token of a chunk stands for it. A query sees those
tokens and the newest ones. Where chunks end moves with the depth.

Akhauri et al., 2024 (arXiv 2411.17685); checked against
abdelfattah-lab/attamba: apps/attamba/core_attamba.py, lingua/transformer.py
(3b3b30c). Deviations: a model starts anew at the first token of a chunk, as the
paper says (the release tells its kernel numbers of tokens within chunks, at
each of which that starts anew); the last token of a text is no end of a chunk
(there it takes the place of the last one).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokjax.attention import core
from tokjax.attention.causal import Causal, need_whole
from tokjax.layer import NOTES, Layer

EPSILON = 1e-5
# Of decay at first: of all configurations of the release. The default of its
# code, 1 to 16, lets a state forget a token before the next one is read.
RATES = (0.01, 2.0)
# Tokens a block up to which sums are faster than products of matrices on a CPU,
# which takes one call for each block.
SMALL = 16


def model_parameters(
  width: int, hidden: int, state: int, heads: int, kernel: int,
  key: PRNGKeyArray,
) -> dict[str, Array]:  # fmt: skip
  """Of one state-space model, drawn as the release does."""
  keys, mixed = jax.random.split(key, 4), hidden + 2 * state
  normal = lambda i, *shape: jax.random.truncated_normal(
    keys[i], -3, 3, shape
  )
  return {
    "in": normal(0, width, hidden + mixed + heads) * width**-0.5,
    "conv": normal(1, kernel, mixed) * kernel**-0.5,
    "rate": jnp.log(jax.random.uniform(keys[2], (heads,), float, *RATES)),
    "skip": jnp.ones((heads,)),
    "norm": jnp.ones((hidden,)),
    "out": normal(3, hidden, width) * hidden**-0.5,
  }


def convolved(
  x: Float[Array, "n c"], filters: Float[Array, "k c"], chunk: Int[Array, "n"]
) -> Float[Array, "n c"]:
  """Each channel filtered over the last tokens of a token's own chunk."""
  out = x * filters[-1][None]
  for back in range(1, min(len(filters), len(x))):
    earlier = jnp.pad(x, [(back, 0), (0, 0)])[: len(x)]
    same = jnp.pad(chunk, (back, 0), constant_values=-2)[: len(x)] == chunk
    earlier = jnp.where(same[:, None], earlier, 0.0)
    out = out + earlier * filters[-1 - back][None]
  return out


def part(x: Array, start: Int[Array, ""] | int, n: int) -> Array:
  """Some rows; a known start spares the gathers that `vmap` makes of others."""
  if isinstance(start, int):
    return x[start : start + n]
  return jax.lax.dynamic_slice_in_dim(x, start, n)


def recurrence(
  values: Float[Array, "n h p"],
  step: Float[Array, "n h"],
  rate: Float[Array, "h"],
  write: Float[Array, "n s"],
  read: Float[Array, "n s"],
  chunk: Int[Array, "n"],
  first: Int[Array, ""] | int,
  length: int,
) -> Float[Array, "n h p"]:
  """What states hold for each token, as products within blocks of a chunk.

  A state decays by `exp(step * rate)` and takes `step * values * write`; zero
  at the first token of a chunk.

  Args:
    values, step: of the heads.
    rate: of decay, negative.
    write, read: vectors that states are written and read with.
    chunk: number of each token's; blocks may hold parts of two.
    first: place of the first token, counted from the start of a block.
    length: tokens a block; static.
  """
  n, before = len(values), first % length
  blocks = -(-(n + length - 1) // length)

  def laid(x, fill=0):
    """Rows as blocks `[m, length, ...]`."""
    ends = [(length, blocks * length - n)] + [(0, 0)] * (x.ndim - 1)
    x = jnp.pad(x, ends, constant_values=fill)
    x = part(x, length - before, blocks * length)
    return x.reshape(blocks, length, *x.shape[1:])

  values, step, write, read = map(laid, (values, step, write, read))
  chunk, at = laid(chunk, -2), jnp.arange(length)
  same = (chunk[:, :, None] == chunk[:, None]) & (at[:, None] >= at[None])[None]
  same = same[..., None]
  # What is left of a token: the decay of all steps behind it.
  total = jnp.cumsum(step, axis=1)
  behind = jnp.where(same, total[:, :, None] - total[:, None], 0.0)
  left = jnp.exp(behind * rate[None, None, None]) * step[:, None]
  weight = jnp.where(same, left, 0.0)
  if length > SMALL:
    weight = weight * jnp.einsum("mts,mks->mtk", read, write)[..., None]
    out = jnp.einsum("mtkh,mkhp->mthp", weight, values)
  else:
    fit = (read[:, :, None] * write[:, None]).sum(axis=-1)
    weight = weight * fit[..., None]
    out = (weight[..., None] * values[:, None]).sum(axis=2)
  return part(out.reshape(blocks * length, *out.shape[2:]), before, n)


@dataclasses.dataclass(frozen=True)
class MultiTokenStates(Causal):
  """See the module; `MultiTokenCache` of `tokjax.cache` holds what it sees.

  Attributes:
    chunk: tokens a chunk; 1: every token is one.
    lead: newest tokens before itself that a query sees.
    state: features of a state for each channel.
    hidden: channels of the state-space models; None: the width.
    heads: of those models, which divide their channels.
    kernel: taps of their causal convolution.
  """

  chunk: int = 8
  lead: int = 1
  state: int = 128
  hidden: int | None = None
  heads: int = 8
  kernel: int = 4

  def __post_init__(self):
    for name in ("chunk", "state", "heads", "kernel"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
    if self.lead < 0:
      raise ValueError(f"lead={self.lead}: must be 0 or more")
    if self.hidden is not None and self.hidden % self.heads:
      raise ValueError(f"heads={self.heads}: must divide hidden={self.hidden}")

  def with_keep(self, keep: float) -> "MultiTokenStates":
    """Chunks of as many tokens as leave about this share of the keys."""
    return dataclasses.replace(self, chunk=max(round(1 / keep), 1))

  @property
  def needs(self) -> tuple[str, ...]:
    return ("x",)

  @property
  def whole(self) -> bool:
    return True

  @property
  def leaves_notes(self) -> str:
    return "states"

  def check(self, layer, prompt):
    if layer.window is not None:
      raise ValueError(
        f"window={layer.window}: sliding layers would see no chunk but the"
        " newest ones; use a model without a window"
      )

  def parameters(self, layer, width, key):
    """Of two state-space models, for keys and for values."""
    if width != layer.kv_heads * layer.head_dim:
      raise ValueError(
        f"{layer.kv_heads} key heads of {layer.head_dim}: must have as many"
        f" channels as the model, {width}, whose parts they are"
      )
    hidden = width if self.hidden is None else self.hidden
    if hidden % self.heads:
      raise ValueError(f"heads={self.heads}: must divide hidden={hidden}")
    made = lambda key: model_parameters(
      width, hidden, self.state, self.heads, self.kernel, key
    )
    return dict(zip("kv", map(made, jax.random.split(key)), strict=True))

  # Where chunks end.

  def shift(self, index: int, depth: int) -> int:
    """How many tokens earlier chunks end in a layer."""
    return min(self.chunk - 1, index * (self.chunk // depth))

  def number(self, layer: Layer, place: Int[Array, "*s"]) -> Int[Array, "*s"]:
    """Of the chunk that a token is in: ends of chunks before it."""
    shift = layer.ask(self.shift)
    first = (place > 0) & (shift < self.chunk - 1)
    return (place + shift) // self.chunk + first

  def end(self, layer: Layer, number: Int[Array, "*s"]) -> Int[Array, "*s"]:
    """The last token of a chunk; the first token is a chunk of its own."""
    first = self.chunk - 1 - layer.ask(self.shift)
    return jnp.maximum(first + (number - (first > 0)) * self.chunk, 0)

  # Keys and values.

  def states(
    self,
    layer: Layer,
    params: dict[str, Array],
    x: Float[Array, "n w"],
    place: Int[Array, "n"] | Int[np.ndarray, "n"],
  ) -> Float[Array, "n g d"]:
    """Inputs plus what a model makes of them and their chunk so far.

    Args:
      layer: where it is.
      params: of the model.
      x: inputs of tokens that follow each other; the chunks of those that are
        used begin among them.
      place: of those in the text; negative: there is no such token.
    """
    hidden, heads = params["norm"].shape[0], params["skip"].shape[0]
    chunk = jnp.where(place < 0, -1, self.number(layer, jnp.maximum(place, 0)))
    made = x @ params["in"]
    gate, mixed = made[:, :hidden], made[:, hidden:-heads]
    step = jax.nn.softplus(made[:, -heads:])
    mixed = jax.nn.silu(convolved(mixed, params["conv"], chunk))
    values, write, read = jnp.split(
      mixed, [hidden, hidden + self.state], axis=-1
    )
    values = values.reshape(len(x), heads, -1)
    first = layer.ask(self.shift) + (
      int(place[0]) if isinstance(place, np.ndarray) else place[0]
    )
    rate = -jnp.exp(params["rate"])
    y = recurrence(values, step, rate, write, read, chunk, first, self.chunk)
    y = (y + params["skip"][None, :, None] * values).reshape(len(x), -1)
    y = y * jax.nn.silu(gate)
    y = y * jax.lax.rsqrt((y * y).mean(axis=-1, keepdims=True) + EPSILON)
    y = x + (y * params["norm"][None]) @ params["out"]
    return y.reshape(len(x), layer.kv_heads, layer.head_dim)

  def keys_and_values(
    self, layer: Layer, params, x: Float[Array, "b n w"], place
  ) -> tuple[Float[Array, "b n g d"], Float[Array, "b n g d"]]:
    """Rotated keys, and values; `place [b, n]`, or NumPy's `[n]` of all."""
    states = lambda name, x, at: self.states(layer, params[name], x, at)
    if place.ndim == 1:
      of = lambda name: jax.vmap(lambda x: states(name, x, place))(x)
    else:
      of = lambda name: jax.vmap(lambda x, at: states(name, x, at))(x, place)
    at = jnp.maximum(place, 0).reshape(-1, x.shape[1])
    at = jnp.broadcast_to(at, x.shape[:2])
    return layer.rotate(of("k"), at), of("v")

  # Attention.

  def attended(
    self,
    layer: Layer,
    q: Float[Array, "b g r c d"],
    ends: tuple[Float[Array, "b g m d"], Float[Array, "b g m d"]],
    ends_seen: Bool[Array, "b c m"],
    newest: tuple[Float[Array, "b g c e d"], Float[Array, "b g c e d"]],
    newest_seen: Bool[Array, "b c e"],
  ) -> Float[Array, "b g r c d"]:
    """One softmax of rotated queries over ends of chunks and newest tokens."""
    far = core.logits(layer, q, ends[0])
    near = jnp.einsum(
      "bgrcd,bgced->bgrce", q, newest[0], preferred_element_type=jnp.float32
    )
    near = core.cap(layer, near * layer.factor)
    seen = jnp.concatenate([ends_seen, newest_seen], axis=-1)[:, None, None]
    weight = core.softmax(jnp.concatenate([far, near], axis=-1), seen)
    weight = weight.astype(newest[1].dtype)
    m = far.shape[-1]
    out = core.mix(weight[..., :m], ends[1])
    return out + jnp.einsum("bgrce,bgced->bgrcd", weight[..., m:], newest[1])

  def seen_ends(
    self, layer: Layer, place: Int[Array, "b c"], many: int
  ) -> Bool[Array, "b c m"]:
    """Ends of chunks before a query but not among its newest tokens."""
    end = self.end(layer, jnp.arange(many))
    return end[None, None] < (place - self.lead)[..., None]

  def __call__(self, layer, arrivals, memory, *, params, carry):
    a = arrivals.clean()
    need_whole(self, a, memory)
    b, t = a.q.shape[:2]
    k, v = self.keys_and_values(layer, params["attend"], a.x, np.arange(t))
    many = -(-t // self.chunk) + 1
    end = jnp.minimum(self.end(layer, jnp.arange(many)), t - 1)
    few = lambda x: core.heads_first(x[:, end])
    ends = few(k), few(v)
    q = core.split(layer.rotate(a.q, a.position), layer.kv_heads)

    def rows(at):
      back = at[:, None] - self.lead + jnp.arange(self.lead + 1)[None]
      near = lambda x: jnp.moveaxis(x[:, jnp.maximum(back, 0)], 3, 1)
      of = jnp.broadcast_to(at[None], (b, len(at)))
      newest = jnp.broadcast_to((back >= 0)[None], (b, *back.shape))
      out = self.attended(
        layer, q[:, :, :, at], ends, self.seen_ends(layer, of, many),
        (near(k), near(v)), newest,
      )  # fmt: skip
      return core.join(out).astype(layer.dtype)

    out = core.over_rows(rows, t)
    carry = {**carry, NOTES: {"states": ends}}
    return self.finish(layer, out, a, params), carry
