"""CSKV: old tokens as low-rank features of the layer's input (2024).

Keys and values of old tokens are rebuilt from features by a learned matrix,
keys before they are rotated; the newest ones stay exact. Windows do not slide:
the text is cut into windows of fixed places, the one that is being filled is
exact, and it is replaced by its features after the step that fills it. A
sliding layer has features of the tokens in sight, as a ring. Checked against
cskv_src/modeling/modeling_llama.py, utils/cache_utils.py (cd79226).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tokjax import budgets
from tokjax.attention import core
from tokjax.cache import entries as entries_lib
from tokjax.cache.entries import Entries
from tokjax.cache.prompted import Prompted, refuse_notes
from tokjax.cache.reads import Query
from tokjax.layer import Layer, Params
from tokjax.slots import Bytes


def factors(
  weight: Float[Array, "w f"],
  rank: int,
  scale: Float[Array, "w"] | None = None,
) -> dict[str, Array]:
  """The best `down` [W, rank] and `up` [rank, F] with down @ up near `weight`.

  Args:
    weight: of a key or value projection.
    rank: number of features.
    scale: of each input, mean |x| ** 0.5 over a calibration text (ASVD); None:
      all inputs count alike.
  """
  scale = jnp.ones(weight.shape[:1]) if scale is None else scale
  u, s, vt = jnp.linalg.svd(scale[:, None] * weight, full_matrices=False)
  root = jnp.sqrt(s[:rank])
  down = u[:, :rank] * root[None] / scale[:, None]
  return {"down": down, "up": root[:, None] * vt[:rank]}


def reconstruction(
  params: Params,
  x: Float[Array, "*b w"],
  k: Float[Array, "*b g d"],
  v: Float[Array, "*b g d"],
) -> Float[Array, ""]:
  """What a layer trains: mean squared errors of keys and values."""
  total = jnp.zeros(())
  for name, true in (("k", k), ("v", v)):
    made = params["cache"][name]
    guess = (x @ made["down"]) @ made["up"]
    total += jnp.square(guess.reshape(true.shape) - true).mean()
  return total


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Features:
  """The state of `LowRank`.

  Attributes:
    k, v: features of all tokens, or of the last n in a ring: the token at place
      p in row p mod n, `[b, n, rank]`.
    position: in the text, `[b, n]`.
    near_k, near_v: exact keys (rotated) and values of the window that is being
      filled, the token at place p in slot p mod window, `[b, window, G, D]`.
    length: tokens that are there, `[b]`.
  """

  k: Float[Array, "*b n rk"]
  v: Float[Array, "*b n rv"]
  position: Int[Array, "*b n"]
  near_k: Float[Array, "*b w g d"]
  near_v: Float[Array, "*b w g d"]
  length: Int[Array, "*b"]


@dataclasses.dataclass(frozen=True)
class LowRank(Prompted):
  """See the module; `params["cache"]` holds `factors` of keys and values.

  Attributes:
    k_density, v_density: features a token, as a fraction of G * D.
    window: tokens of a window. A step whose token is the n-th sees the newest
      n mod window tokens exact, or `window` of them where that is 0.
  """

  k_density: float = 0.2
  v_density: float = 0.2
  window: int = 32

  needs = ("x",)

  def __post_init__(self):
    budgets.check_keep(self.k_density, "k_density")
    budgets.check_keep(self.v_density, "v_density")
    if self.window < 1:
      raise ValueError(f"window={self.window}: must be 1 or more")

  def check(self, layer, attend, prompt, decode):
    refuse_notes(self, attend)

  def with_keep(self, keep: float) -> "LowRank":
    return dataclasses.replace(self, k_density=keep, v_density=keep)

  def ranks(self, layer: Layer) -> tuple[int, int]:
    """Features of keys and of values."""
    whole = layer.kv_heads * layer.head_dim
    of = lambda density: max(1, round(density * whole))
    return of(self.k_density), of(self.v_density)

  def parameters(
    self, layer: Layer, width: int, key: PRNGKeyArray
  ) -> dict[str, dict[str, Array]]:
    """Random ones; a pretrained model's come from `factors`."""
    made, whole = {}, layer.kv_heads * layer.head_dim
    for name, rank in zip("kv", self.ranks(layer), strict=True):
      key, a, b = jax.random.split(key, 3)
      made[name] = {
        "down": jax.random.normal(a, (width, rank)) * width**-0.5,
        "up": jax.random.normal(b, (rank, whole)) * rank**-0.5,
      }
    return made

  def compress(self, layer, space, notes, params):
    del notes
    m, w, n = space.memory, self.window, space.prompt
    made = params["cache"]
    room = layer.in_sight(n + space.decode)

    def rows(x):
      if room >= n:
        return jnp.pad(x, [(0, 0), (0, room - n)] + [(0, 0)] * (x.ndim - 2))
      place = jnp.maximum(_places(space.length, room), 0)
      return jax.vmap(lambda x, at: x[at])(x, place)

    features = lambda name: rows(m.x @ made[name]["down"]).astype(layer.dtype)
    start = space.length[:, None] // w * w
    place = jnp.clip(start + jnp.arange(w)[None], 0, n - 1)
    pick = jax.vmap(lambda x, at: x[at])
    k = layer.rotate(m.k, m.position)
    return Features(
      features("k"), features("v"), rows(m.position.astype(jnp.int32)),
      pick(k, place).astype(layer.dtype), pick(m.v, place).astype(layer.dtype),
      space.length,
    )  # fmt: skip

  def step(self, layer, state, arrivals, attend, params, carry):
    a, made = arrivals, params["cache"]
    state = self._appended(layer, state, a, made)
    g, n = layer.kv_heads, state.position.shape[1]
    heads = lambda x: x.reshape(*x.shape[:2], g, -1).astype(jnp.float32)
    old_k = layer.rotate(heads(state.k @ made["k"]["up"]), state.position)
    old_v = heads(state.v @ made["v"]["up"])
    length = state.length[:, None]
    place = _places(state.length, n)
    start = (length - 1) // self.window * self.window
    old = (place >= 0) & (place < start)
    at = start + jnp.arange(self.window)[None]
    near = (at < length) & (at >= length - n)
    pick = jax.vmap(lambda x, at: x[at])
    position = pick(state.position, at % n)
    both = lambda x, y: core.heads_first(
      jnp.concatenate([x, y.astype(jnp.float32)], axis=1)
    )
    k, v = both(old_k, state.near_k), both(old_v, state.near_v)
    shape = k.shape[:3]
    wide = lambda x, y: jnp.broadcast_to(
      jnp.concatenate([x, y], axis=1)[:, None], shape
    )
    entries = Entries(
      k, v, wide(state.position, position), jnp.full(shape[:2], shape[2])
    )
    q = core.split(layer.rotate(a.q, a.position), g)
    query = Query(layer, q, a.position[:, 0], attend)
    seen = wide(old, near) & query.seen(entries)
    out, _ = query.attention(
      entries, query.logits(entries), seen[:, :, None, None]
    )
    return core.join(out).astype(layer.dtype), state, carry

  def _appended(self, layer, state: Features, a, made) -> Features:
    k = layer.rotate(a.k, a.position)

    def one(s, k, v, x, position, valid):
      n, w = s.position.shape[0], self.window
      at = jnp.where(valid, s.length % n, n)
      slot = jnp.where(valid, s.length % w, w)
      put = lambda old, at, new: old.at[at].set(
        jnp.asarray(new, old.dtype), mode="drop"
      )
      return Features(
        put(s.k, at, x @ made["k"]["down"]),
        put(s.v, at, x @ made["v"]["down"]),
        put(s.position, at, position),
        put(s.near_k, slot, k), put(s.near_v, slot, v), s.length + valid,
      )  # fmt: skip

    return jax.vmap(one)(
      state, k[:, 0], a.v[:, 0], a.x[:, 0], a.position[:, 0], a.valid[:, 0]
    )

  def bytes(self, layer, state: Features) -> Bytes:
    size = jnp.dtype(layer.dtype).itemsize
    near = state.length % self.window
    exact = 2 * layer.kv_heads * layer.head_dim * size
    held = jnp.minimum(state.length, state.position.shape[1])
    total = held * (sum(self.ranks(layer)) * size + 4) + near * exact
    return Bytes(total.astype(jnp.float32), entries_lib.physical_bytes(state))


def _places(length: Int[Array, "b"], room: int) -> Int[Array, "b room"]:
  """Which token of prompts of these lengths is in each row of a ring.

  Negative where there is none.
  """
  last = length[:, None] - 1
  return last - (last - jnp.arange(room)[None]) % room
