"""LoCoCo: a cache of fixed size, fed in blocks, merged by a convolution (2024).

Half of the cache are the tokens that received most attention in the last
block; the other half are weighted means of all the rest, with weights that a
short convolution over the sequence predicts. Checked against
llama/memory_compressor.py (1be3fec). Merged keys mix rotations, and do not
count for more than one.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokjax import selection
from tokjax.attention import core
from tokjax.attention.causal import Causal
from tokjax.cache import entries as entries_lib
from tokjax.cache.entries import Entries
from tokjax.layer import Arrivals, Layer
from tokjax.slots import Bytes


@dataclasses.dataclass(frozen=True)
class Convolved:
  """See the module.

  Attributes:
    slots: entries after a merge (M), even.
    slack: entries beyond that are let in before one.
    block: tokens of a prompt that arrive together; chunks of a prompt are
      multiples of it.
    kernel: of the convolution, odd.
    detach: whether what a merge reads is cut off from gradients: then the
      convolution learns from the block that follows, as the published training
      does, and activations of earlier blocks are not needed.
  """

  slots: int = 512
  slack: int = 16
  block: int = 512
  kernel: int = 21
  detach: bool = True

  needs = ()

  def __post_init__(self):
    if self.slots < 2 or self.slots % 2:
      raise ValueError(f"slots={self.slots}: must be even, 2 or more")
    if self.kernel % 2 == 0 or self.kernel < 1:
      raise ValueError(f"kernel={self.kernel}: must be odd")
    if self.block < 1 or self.slack < 0:
      raise ValueError(
        f"block={self.block}, slack={self.slack}: a block has at least one"
        " token, the slack is not negative"
      )

  def check(self, layer, attend, prompt: int, decode: int) -> None:
    """A prompt is read through the cache, with plain causal attention."""
    if type(attend) is not Causal:
      raise ValueError(
        "Convolved reads prompts through its own cache, block by block, and"
        f" cannot attend as {type(attend).__name__} does; use attend=None"
      )
    if layer.window is not None:
      raise ValueError(
        "Convolved keeps means of tokens, which lie neither inside nor outside"
        f" a window; layer {layer.index} has window={layer.window}, use ByLayer"
        " with another cache there"
      )

  def parameters(
    self, layer: Layer, width: int, key: PRNGKeyArray
  ) -> dict[str, Array]:
    """`kernel` [taps, 2 D, M / 2], `bias` [M / 2], `mix` []."""
    d = 2 * layer.head_dim
    shape = (self.kernel, d, self.slots // 2)
    kernel = jax.random.normal(key, shape) * (self.kernel * d) ** -0.5
    return {
      "kernel": kernel, "bias": jnp.zeros(shape[-1:]), "mix": jnp.float32(0.5)
    }  # fmt: skip

  def init(self, layer, batch: int, prompt: int, decode: int) -> Entries:
    room = self.slots + self.slack
    shape = (batch, layer.kv_heads, room)
    kv = jnp.zeros((*shape, layer.head_dim), layer.dtype)
    zero = jnp.zeros(shape, jnp.int32)
    return Entries(kv, kv, zero, jnp.zeros(shape[:2], jnp.int32))

  def prefill(
    self, layer, state, arrivals, *, attend, params, carry, last: bool
  ):
    """Block after block; the state has the same size throughout."""
    a = arrivals.clean()
    b, t = a.valid.shape
    number = t // self.block
    end = number * self.block
    cut = lambda x: jnp.swapaxes(
      x[:, :end].reshape(b, number, self.block, *x.shape[2:]), 0, 1
    )

    def step(state, part):
      out, state = self._block(layer, state, part, params)
      return state, out

    state, outs = jax.lax.scan(step, state, jax.tree.map(cut, a))
    out = jnp.swapaxes(outs, 0, 1).reshape(b, end, *outs.shape[3:])
    if end < t:
      rest = jax.tree.map(lambda x: x[:, end:], a)
      more, state = self._block(layer, state, rest, params)
      out = jnp.concatenate([out, more], axis=1)
    return attend.finish(layer, out, a, params), state, carry

  def decode(self, layer, state, arrivals, *, attend, params, carry):
    a = arrivals.clean()
    out, state = self._block(layer, state, a, params)
    return attend.finish(layer, out, a, params), state, carry

  def _block(self, layer, state: Entries, a: Arrivals, params):
    """Attention to the cache and the block itself, then a merge if needed."""
    c = a.q.shape[1]
    q = core.split(layer.rotate(a.q, a.position), layer.kv_heads)
    k = core.heads_first(layer.rotate(a.k, a.position))
    v = core.heads_first(a.v)
    both = lambda x, y: jnp.concatenate([x, y.astype(x.dtype)], axis=2)
    keys, values = both(state.k, k), both(state.v, v)
    causal = core.visible(layer, a.position, a.position, a.valid)
    causal = jnp.broadcast_to(causal[:, None], (*state.length.shape, c, c))
    cached = state.valid
    if layer.window is not None:
      gap = a.position[:, None, :, None] - state.position[:, :, None]
      cached = cached[:, :, None] & (gap < layer.window)
    else:
      cached = jnp.broadcast_to(
        cached[:, :, None], (*causal.shape[:3], state.room)
      )
    seen = jnp.concatenate([cached, causal], axis=-1)
    weight = core.softmax(core.logits(layer, q, keys), seen[:, :, None])
    out = core.join(core.mix(weight, values))
    real = a.valid[:, None, None, :, None]
    mass = jnp.where(real, weight, 0.0).sum(axis=(2, 3))
    return out.astype(layer.dtype), self._merged(
      state, a, k, v, mass, params["cache"]
    )

  def _merged(self, state: Entries, a: Arrivals, k, v, mass, made) -> Entries:
    """Cache and block in one list, cut to the number of slots if too long."""
    c, room = a.valid.shape[1], state.room

    def one(e, k, v, mass, position, valid):
      at = jnp.where(valid, e.length + jnp.arange(c), room + c)
      grow = lambda x, new: jnp.concatenate(
        [x, jnp.zeros((c, *x.shape[1:]), x.dtype)]
      ).at[at].set(new.astype(x.dtype), mode="drop")  # fmt: skip
      whole = Entries(
        grow(e.k, k), grow(e.v, v), grow(e.position, position),
        e.length + valid.sum(dtype=jnp.int32),
      )  # fmt: skip
      score = grow(mass[:room], mass[room:])
      less = self.merge(whole, score, made)
      full = whole.length > self.slots + self.slack
      cut = lambda x: x[:room]
      return jax.tree.map(
        lambda x, y: jnp.where(full, x, y),
        less.map(lambda x: _fit(x, room), less.length),
        whole.map(cut, whole.length),
      )

    wide = lambda x: jnp.broadcast_to(
      x[:, None], (x.shape[0], state.k.shape[1], x.shape[1])
    )
    return entries_lib.over_heads(
      one, state, k, v, mass, wide(a.position), wide(a.valid)
    )

  def merge(
    self, whole: Entries, score: Float[Array, "n"], made: dict[str, Array]
  ) -> Entries:
    """One head's entries cut to the number of slots."""
    half, n = self.slots // 2, whole.room
    valid = whole.valid
    k, v = whole.k, whole.v
    if self.detach:
      k, v, score = (jax.lax.stop_gradient(x) for x in (k, v, score))
    top = selection.top_k(score, min(self.slots, n), mask=valid)
    heavy = jnp.sort(top.index[:half])
    stays = jnp.zeros((n,), bool).at[heavy].set(True)
    rest = selection.of_mask(valid & ~stays, n)
    weight = self.weights(k[rest.index], v[rest.index], rest.valid, made)
    # One-hot rows of the next best ones, in the text's order.
    best = jnp.sort(top.index[half : self.slots])
    hot = (best[:, None] == rest.index[None]) & rest.valid[None]
    weight = (1 - made["mix"]) * hot + made["mix"] * weight
    join = lambda x: jnp.concatenate(
      [x[heavy], (weight @ x[rest.index].astype(jnp.float32)).astype(x.dtype)]
    )
    position = jnp.concatenate([whole.position[heavy], whole.position[best]])
    return Entries(join(k), join(v), position, jnp.int32(self.slots))

  def weights(
    self,
    k: Float[Array, "n d"],
    v: Float[Array, "n d"],
    valid: Bool[Array, "n"],
    made: dict[str, Array],
  ) -> Float[Array, "m n"]:
    """Predicted shares of all entries in each merged one; rows sum to one."""
    x = jnp.concatenate([k, v], axis=-1).astype(jnp.float32)
    x = jnp.where(valid[:, None], x, 0.0)
    wide = self.kernel // 2
    x = jnp.pad(x, ((wide, wide), (0, 0)))
    n = valid.shape[0]
    taps = jnp.stack([x[i : i + n] for i in range(self.kernel)])
    y = jnp.einsum("knd,kdm->mn", taps, made["kernel"])
    y = jax.nn.relu(y + made["bias"][:, None])
    return core.softmax(y, valid[None])

  def bytes(self, layer, state: Entries) -> Bytes:
    return Bytes(
      entries_lib.logical_bytes(state), entries_lib.physical_bytes(state)
    )


def _fit(x: Array, room: int) -> Int[Array, "*n"] | Float[Array, "*n"]:
  """Zeros behind, up to `room` rows."""
  return jnp.pad(x, [(0, room - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
