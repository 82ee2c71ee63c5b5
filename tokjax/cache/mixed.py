"""ZipCache: salient tokens in more bits than the others (He et al., 2024).

Checked against zipcache/models (b6932b9 and later). Tokens are stored in two
tiers of different precision; new ones are buffered exactly before that. In a
sliding layer the tiers hold what is in sight: as in a ring, rows of a new batch
replace the oldest ones, and so do its scales.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import selection
from tokjax.attention import core
from tokjax.cache import entries as entries_lib
from tokjax.cache import quantisation as few
from tokjax.cache import scores as importance
from tokjax.cache.prompt import Prompt, over_prompts
from tokjax.cache.prompted import Prompted, refuse_notes
from tokjax.cache.reads import Query
from tokjax.cache.tiers import Tier, Tiers
from tokjax.layer import Layer
from tokjax.slots import Bytes


@dataclasses.dataclass(frozen=True)
class Mixed(Prompted):
  """Two precisions; see the module.

  Attributes:
    bits: of salient tokens and of the others.
    plain: part of the tokens that are not salient.
    gap: decoded tokens that are buffered exactly before they are coded, the
      last token's attention saying which of them are salient.
    recent, random: a prompt of n tokens is probed by its last n / recent
      queries, and by n / random others that are drawn.
    seed: of that draw.
  """

  bits: tuple[int, int] = (4, 2)
  plain: float = 0.4
  gap: int = 100
  recent: int = 20
  random: int = 20
  seed: int = 0

  queries = None

  def __post_init__(self):
    for bits in self.bits:
      few.check_bits(bits)
    if not 0 <= self.plain <= 1 or self.gap < 1:
      raise ValueError(
        f"plain={self.plain}, gap={self.gap}: a part lies in [0, 1], a gap is"
        " at least 1"
      )

  def check(self, layer, attend, prompt, decode):
    refuse_notes(self, attend)
    if layer.head_dim % 8:
      raise ValueError(
        f"heads of {layer.head_dim} channels cannot be packed by eights"
      )

  def with_keep(self, keep: float) -> "Mixed":
    """That part of the tokens is salient."""
    return dataclasses.replace(self, plain=round(1 - keep, 9))

  def probes(self, prompt: Prompt) -> tuple[Int[Array, "p"], Bool[Array, "p"]]:
    """Numbers of the probing queries."""
    w, n = prompt.q.shape[0], prompt.length
    late = -(-n // self.recent)
    place = jnp.arange(w)
    key = jax.random.fold_in(jax.random.key(self.seed), prompt.layer.number)
    draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))
    drawn = selection.top_k(
      draw(place), w // self.random, mask=place < n - late,
      count=n // self.random,
    )  # fmt: skip
    last = n - 1 - jnp.arange(-(-w // self.recent))
    valid = jnp.concatenate([drawn.valid, last >= n - late])
    return jnp.concatenate([drawn.index, jnp.maximum(last, 0)]), valid

  def saliency(self, prompt: Prompt) -> Float[Array, "g n"]:
    """Mean attention over the probes that can see a key."""
    at, valid = self.probes(prompt)
    p = importance.rows(prompt, at, prompt.rotated_k)
    p = jnp.where(valid[None, None, :, None], p, 0.0).sum(axis=(1, 2))
    sees = prompt.q_position[at][:, None] >= prompt.position[None]
    count = (sees & valid[:, None]).sum(axis=0)
    return p / jnp.maximum(count, 1)[None]

  def compress(self, layer, space, notes, params):
    del notes, params  # Refused when the model was built; nothing learned.
    whole = entries_lib.of_memory(layer, space.memory, rotated=True)
    n = layer.in_sight(space.prompt)
    salient, other, batches = self.rooms(layer, n, space.decode)
    d = layer.head_dim
    exact = jnp.zeros((self.gap, d), layer.dtype)
    start = Tiers(
      Tier.empty(layer, self.bits[0], salient, batches),
      Tier.empty(layer, self.bits[1], other, batches),
      jnp.zeros((batches, d), layer.dtype),
      exact, exact, jnp.zeros((self.gap,), jnp.int32), jnp.int32(0),
      jnp.int32(0),
    )  # fmt: skip
    score = over_prompts(layer, space, self.saliency)
    whole = entries_lib.newest(whole.replace(extra={"score": score}), n)
    counts = jnp.asarray([self.rare(i) for i in range(n + 1)])
    counts = counts[jnp.minimum(space.length, n)]

    def one(e, count):
      score = e.extra["score"]
      return start.coded(e.k, e.v, e.position, e.valid, score, count)

    wide = jnp.broadcast_to(counts[:, None], whole.length.shape)
    return entries_lib.over_heads(one, whole, wide)

  def rare(self, tokens: int) -> int:
    """Tokens of that many that are not salient."""
    return int(self.plain * tokens)

  def rooms(
    self, layer: Layer, n: int, decode: int
  ) -> tuple[int, int, int]:
    """Rows of the salient tier and of the other, and batches that have scales.

    Args:
      layer: where.
      n: tokens of the longest prompt that are in sight.
      decode: tokens to be generated.
    """
    gap, more, few_of = self.gap, decode // self.gap, self.rare(self.gap)
    window = layer.window

    def most(first: int, each: int) -> int:
      if window is None:
        return first + more * each
      # After t batches: what is in sight of the prompt, and of the batches.
      full = max(window // gap * each + min(each, window % gap), each)
      left = lambda t: min(first, max(window - t * gap, 1))
      return max(left(t) + min(t * each, full) for t in range(more + 1))

    batches = 1 + more
    if window is not None:
      batches = min(batches, -(-window // gap))
    salient = most(max(n - self.rare(n), 1) + 1, gap - few_of)
    return salient, most(max(self.rare(n), 1), few_of), batches

  def step(self, layer, state, arrivals, attend, params, carry):
    a = arrivals
    k = layer.rotate(a.k, a.position)[:, 0]
    state = _buffered(state, k, a.v[:, 0], a.position[:, 0], a.valid[:, 0])

    def rows(s):
      parts = [tier.rows(s.scale) for tier in (s.salient, s.other)]
      k, v = (
        jnp.concatenate([*some, exact])
        for some, exact in zip(zip(*parts, strict=True), (s.k, s.v),
                               strict=True)
      )  # fmt: skip
      place = jnp.arange(self.gap) < s.length
      valid = jnp.concatenate([s.salient.valid, s.other.valid, place])
      position = jnp.concatenate(
        [s.salient.position, s.other.position, s.position]
      )
      return k, v, position, valid

    k, v, position, seen = entries_lib.over_heads(rows, state)
    if layer.window is not None:
      seen = seen & (a.position[:, None] - position < layer.window)
    entries = entries_lib.Entries(
      k, v, position, jnp.full(seen.shape[:2], seen.shape[2], jnp.int32)
    )
    q = core.split(layer.rotate(a.q, a.position), layer.kv_heads)
    query = Query(layer, q, a.position[:, 0], attend)
    out, weight = query.attention(
      entries, query.logits(entries), seen[:, :, None, None]
    )
    row = weight.sum(axis=(2, 3))[:, :, -self.gap :]
    return core.join(out), self._flushed(state, row), carry

  def _flushed(self, state: Tiers, row: Float[Array, "b g gap"]) -> Tiers:
    """Codes buffers that are full, by the last token's attention."""
    full = state.length >= self.gap

    def flush(state):
      def one(s, row, full):
        valid = jnp.ones((self.gap,), bool)
        new = s.coded(
          s.k.astype(jnp.float32), s.v.astype(jnp.float32), s.position, valid,
          row, self.rare(self.gap),
        )  # fmt: skip
        return jax.tree.map(lambda a, b: jnp.where(full, a, b), new, s)

      return entries_lib.over_heads(one, state, row, full)

    return jax.lax.cond(full.any(), flush, lambda s: s, state)

  def bytes(self, layer, state: Tiers) -> Bytes:
    size, d = jnp.dtype(layer.dtype).itemsize, layer.head_dim
    total = state.length * (2 * d * size + 4)
    batches = jnp.minimum(state.batches, state.scale.shape[-2])
    total = total + batches * d * size
    for bits, tier in zip(self.bits, (state.salient, state.other), strict=True):
      one = 2 * d * bits // 8 + 2 * size + 8
      total = total + tier.length * one + batches * 2 * d * size
    return Bytes(
      total.sum(axis=1).astype(jnp.float32), entries_lib.physical_bytes(state)
    )


def _buffered(state: Tiers, k, v, position, valid) -> Tiers:
  """One token more in the buffer, where `valid`."""

  def one(s, k, v, position, valid):
    at = jnp.where(valid, s.length, s.position.shape[0])
    put = lambda x, new: x.at[at].set(jnp.asarray(new, x.dtype), mode="drop")
    return dataclasses.replace(
      s, k=put(s.k, k), v=put(s.v, v), position=put(s.position, position),
      length=s.length + valid,
    )  # fmt: skip

  wide = lambda x: jnp.broadcast_to(x[:, None], k.shape[:2])
  return entries_lib.over_heads(one, state, k, v, wide(position), wide(valid))
