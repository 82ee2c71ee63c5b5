"""A draft that guesses several tokens at once from a compressed image (FLASH).

One attention layer reads what the language model made of a prompt, its normed
features behind the last block, and says what the next features will be. The
visual tokens are pooled to a few latents; text behind the image comes as the
feature of a token with the embedding of the token after it. The head of the
language model turns guessed features into tokens.

Wang et al., 2025, FLASH; see the recipe `flash` for what it was checked against
and where it deviates.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokjax.attention import core
from tokjax.attention.padding import RealFirst
from tokjax.tokens import Kind

# Noise on features of shorter texts is larger, in the ratio of the lengths.
USUAL = 512


class Drafted(NamedTuple):
  """What the draft says of whole texts, next to what is true.

  Rows are text tokens in order, padding behind them.

  Attributes:
    features: guessed of the next k rows, `[b, t, k, d]`.
    target: true ones of those, `[b, t, k, d]`.
    weight: 1 where a guess counts: behind the first image, and there is such a
      row, `[b, t, k]`.
  """

  features: Float[Array, "b t k d"]
  target: Float[Array, "b t k d"]
  weight: Float[Array, "b t k"]


class Seen(NamedTuple):
  """Keys and values of the draft.

  Attributes:
    k, v: keys rotated, `[b, n, g, f]`.
    position, valid: `[b, n]`.
    place: position of the next row, `[b]`.
    taken: rows that were appended, `[b]`.
  """

  k: Float[Array, "b n g f"]
  v: Float[Array, "b n g f"]
  position: Int[Array, "b n"]
  valid: Bool[Array, "b n"]
  place: Int[Array, "b"]
  taken: Int[Array, "b"]


class Laid(NamedTuple):
  """A prompt as the draft reads it: what is pooled, then rows of text.

  Attributes:
    x: inputs, `[b, m + t, d]`.
    position, valid: `[b, m + t]`.
    behind: rows behind the first image, or all of a text without, `[b, t]`.
    order: of the text rows among the tokens of the prompt.
  """

  x: Float[Array, "b n d"]
  position: Int[Array, "b n"]
  valid: Bool[Array, "b n"]
  behind: Bool[Array, "b t"]
  order: RealFirst


class LatentDraft(nn.Module):
  """See the module.

  Attributes:
    latents: what the visual tokens of a prompt are pooled to; None: they are
      not pooled.
    ahead: features, and so tokens, that are guessed at once.
    groups: key heads; every query head attends to each, and the outputs are
      added up.
    noise: of features in training, see `__call__`.
    width, heads, rotary: of the language model, which fills them in; the last
      turns queries and keys by their places with a base of 10,000, as there.
  """

  latents: int | None = 64
  ahead: int = 5
  groups: int = 4
  noise: float = 0.2
  width: int = 0
  heads: int = 1
  rotary: Callable[..., Array] | None = None

  def setup(self):
    d, size = self.width, self.width // self.heads
    if self.latents is not None:
      init = nn.initializers.normal(0.02)
      self.pool = self.param("latents", init, (self.latents, d))
    self.join, self.out = nn.Dense(d), nn.Dense(d)
    self.query = nn.Dense(self.heads * size)
    self.key, self.value = (nn.Dense(self.groups * size) for _ in range(2))
    self.wide, self.next = nn.Dense(4 * d), nn.Dense(self.ahead * d)

  def __call__(
    self,
    features: Float[Array, "b n d"],
    embeddings: Float[Array, "b n d"],
    kind: Int[Array, "b n"],
    valid: Bool[Array, "b n"],
    key: PRNGKeyArray | None = None,
  ) -> Drafted:
    """Guesses from every text token on, for training.

    Args:
      features: normed, behind the last block.
      embeddings: as they entered the first one.
      kind, valid: of the tokens.
      key: for uniform noise on the features that are read, of a width of
        `noise` times 512 / n; None: there is none.
    """
    shown = features
    if key is not None:
      width = self.noise * USUAL / features.shape[1]
      shown += width * (jax.random.uniform(key, features.shape) - 0.5)
    laid = self.lay(shown, embeddings, None, kind, valid)
    rows = slice(-laid.behind.shape[1], None)
    guessed = self.guessed(
      laid.x[:, rows], laid.position[:, rows], self.seen(laid)
    )
    true = laid.order.apply(features)
    text = laid.order.apply(valid & (kind == Kind.TEXT))
    after = 1 + jnp.arange(self.ahead)[None]
    after = after + jnp.arange(true.shape[1])[:, None]
    at = jnp.minimum(after, true.shape[1] - 1)
    there = (after < true.shape[1])[None] & text[:, at]
    weight = there & (laid.behind & text)[..., None]
    return Drafted(guessed, true[:, at], weight.astype(jnp.float32))

  def begin(
    self,
    features: Float[Array, "b n d"],
    embeddings: Float[Array, "b n d"],
    following: Float[Array, "b d"],
    kind: Int[Array, "b n"],
    valid: Bool[Array, "b n"],
    room: tuple[int, int],
  ) -> tuple[Float[Array, "b k d"], Seen]:
    """Reads prompts; guesses the features behind their last tokens.

    Args:
      features, embeddings, kind, valid: as in a call.
      following: embedding of the token after each prompt.
      room: places of text of a prompt, and of tokens to come (static).
    """
    laid = self.lay(features, embeddings, following, kind, valid, room[0])
    seen, text = self.seen(laid), laid.behind.shape[1]
    last = laid.valid[:, -text:].sum(axis=1) - 1
    last = (jnp.maximum(last, 0) + laid.x.shape[1] - text)[:, None]
    x, position = core.taken(laid.x, last), core.taken(laid.position, last)
    out = self.guessed(x, position, seen)
    pad = lambda x: jnp.pad(x, [(0, 0), (0, room[1])] + [(0, 0)] * (x.ndim - 2))
    k, v, position, valid = map(pad, seen[:4])
    return out[:, 0], Seen(k, v, position, valid, seen.place, seen.taken)

  def more(
    self,
    seen: Seen,
    features: Float[Array, "b t d"],
    following: Float[Array, "b t d"],
    count: Int[Array, "b"],
    room: int,
  ) -> tuple[Float[Array, "b k d"], Seen]:
    """Reads tokens of which the model is sure; guesses what comes behind.

    Args:
      seen: so far.
      features: of the tokens.
      following: embedding of the token after each.
      count: how many are real, 0 for texts that are complete.
      room: as in `begin`, of tokens to come (static).
    """
    t = features.shape[1]
    new = jnp.arange(t)[None] < count[:, None]
    x = self.joined(features, following)
    position = seen.place[:, None] + jnp.arange(t)[None]
    k, v = self.keys(x, position)
    n = seen.valid.shape[1]
    at = n - room + seen.taken[:, None] + jnp.arange(t)[None]
    at = jnp.where(new, at, n)
    put = jax.vmap(lambda x, i, new: x.at[i].set(new, mode="drop"))
    seen = Seen(
      put(seen.k, at, k), put(seen.v, at, v), put(seen.position, at, position),
      put(seen.valid, at, new), seen.place + count, seen.taken + count,
    )  # fmt: skip
    last = jnp.maximum(count - 1, 0)[:, None]
    x, position = core.taken(x, last), core.taken(position, last)
    return self.guessed(x, position, seen)[:, 0], seen

  # Parts.

  def lay(
    self, features, embeddings, following, kind, valid, room=None
  ) -> Laid:
    """The prompt as it is read; see `begin`."""
    text, visual = valid & (kind == Kind.TEXT), valid & (kind == Kind.VISUAL)
    order = RealFirst.of(text)
    rows, real, token = (order.apply(x) for x in (features, text, embeddings))
    count = text.sum(axis=1, dtype=jnp.int32)
    next_ = jnp.roll(token, -1, axis=1)
    if following is not None:
      next_ = following_each(token, count, following)
    rows, real, next_ = (x[:, :room] for x in (rows, real, next_))
    before = (text & (jnp.cumsum(visual, axis=1) == 0)).sum(axis=1)
    before = jnp.where(visual.any(axis=1), before, 0)[:, None]
    place = jnp.arange(rows.shape[1])[None]
    behind = place >= before
    rows = jnp.where(behind[..., None], self.joined(rows, next_), rows)
    pooled, there = self.pooled(features, visual)
    held = there.sum(axis=1, keepdims=True, dtype=jnp.int32)
    at = before + jnp.arange(pooled.shape[1])[None]
    return Laid(
      jnp.concatenate([pooled, rows], axis=1),
      jnp.concatenate([at, place + jnp.where(behind, held, 0)], axis=1),
      jnp.concatenate([there, real], axis=1),
      behind,
      order,
    )

  def pooled(
    self, features: Float[Array, "b n d"], visual: Bool[Array, "b n"]
  ) -> tuple[Float[Array, "b m d"], Bool[Array, "b m"]]:
    """Visual features that the draft reads, and which are real.

    A latent is their mean by a softmax of its products with them, not scaled.
    """
    if self.latents is None:
      order = RealFirst.of(visual)
      return order.apply(features), order.apply(visual)
    x = jnp.where(visual[..., None], features, 0.0)
    product = jnp.einsum("md,bnd->bmn", self.pool, x)
    weight = jax.nn.softmax(product, axis=-1, where=visual[:, None])
    some = visual.any(axis=1, keepdims=True)
    return weight @ x, jnp.broadcast_to(some, (len(x), self.latents))

  def joined(
    self, features: Float[Array, "b t d"], following: Float[Array, "b t d"]
  ) -> Float[Array, "b t d"]:
    """Inputs of text behind an image."""
    return self.join(jnp.concatenate([following, features], axis=-1))

  def keys(
    self, x: Float[Array, "b n d"], position: Int[Array, "b n"]
  ) -> tuple[Float[Array, "b n g f"], Float[Array, "b n g f"]]:
    """Rotated keys, and values."""
    split = lambda y: y.reshape(*y.shape[:2], self.groups, -1)
    return self.rotary(split(self.key(x)), position), split(self.value(x))

  def seen(self, laid: Laid) -> Seen:
    """Keys and values of a prompt."""
    k, v = self.keys(laid.x, laid.position)
    place = jnp.where(laid.valid, laid.position, -1).max(axis=1) + 1
    return Seen(
      k, v, laid.position, laid.valid, place, jnp.zeros_like(place)
    )

  def guessed(
    self, x: Float[Array, "b t d"], position: Int[Array, "b t"], seen: Seen
  ) -> Float[Array, "b t k d"]:
    """Features behind each row, of one attention without norm and residual.

    Every query head attends to all key heads, one softmax each.
    """
    b, t, d = x.shape
    size = d // self.heads
    q = self.rotary(self.query(x).reshape(b, t, self.heads, size), position)
    product = jnp.einsum("bthf,bngf->bhgtn", q, seen.k) * size**-0.5
    past = seen.position[:, None] <= position[..., None]
    shown = seen.valid[:, None] & past
    weight = jax.nn.softmax(product, axis=-1, where=shown[:, None, None])
    y = jnp.einsum("bhgtn,bngf->bthf", weight, seen.v).reshape(b, t, d)
    y = self.next(nn.silu(self.wide(self.out(y))))
    return y.reshape(b, t, self.ahead, d)


def following_each(
  x: Array, count: Int[Array, "b"], following: Array
) -> Array:
  """What comes behind each of the first `count` rows of `x [b, n, ...]`.

  Args:
    x: rows in order.
    count: how many are real.
    following: what comes behind the last real one, `[b, ...]`.
  """
  last = jnp.arange(x.shape[1])[None] == count[:, None] - 1
  last = last.reshape(*last.shape, *[1] * (x.ndim - 2))
  return jnp.where(last, following[:, None], jnp.roll(x, -1, axis=1))
