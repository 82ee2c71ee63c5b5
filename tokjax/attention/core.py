"""Softmax attention of grouped queries, in the pieces that methods change.

Queries and keys come rotated. The letters are those of a decoder: `b`
examples, `t` queries, `n` keys, `H` query heads, `G` key heads, `r = H / G`
query heads a key head, `D` features. All is computed in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import aot
from pallas_kernels import layout as layouts
from tokjax.layer import Layer, Rotary

# Rows of queries whose logits are held at a time.
BLOCK = 256
# Prompts from here on that arrive whole go through the block-sparse kernel.
LONG = 1024


def logits(
  layer: Layer,
  q: Float[Array, "b g r t d"],
  k: Float[Array, "b g n d"],
  place: Int[np.ndarray, "n"] | None = None,
) -> Float[Array, "b g r t n"]:
  """Scaled, soft-capped products.

  Args:
    layer: static facts.
    q: rotated queries.
    k: keys; rotated, if `place` is None.
    place: positions that keys are rotated to.
  """
  rotary = None if place is None else layer.rotary
  if q.shape[3] == 1:
    q = q[:, :, :, 0]
    product = _of_one(q, k, rotary, place)
  else:
    if rotary is not None:
      k = layer.rotate(k[..., None, :], place[None, None])[..., 0, :]
    product = jnp.einsum(
      "bgrtd,bgnd->bgrtn", q, k, preferred_element_type=jnp.float32
    )
  return cap(layer, product * layer.factor)


def logits_of_example(
  layer: Layer,
  q: Float[Array, "c h d"],
  k: Float[Array, "n g d"],
  place: Int[np.ndarray, "n"] | None = None,
) -> Float[Array, "g r c n"]:
  """`logits` of one example, token by token."""
  q, k = split(q[None], layer.kv_heads), heads_first(k[None])
  return logits(layer, q, k, place)[0]


def _of_one(
  q: Float[Array, "b g r d"],
  k: Float[Array, "b g n d"],
  rotary: Rotary | None,
  place: Int[np.ndarray, "n"] | None,
) -> Float[Array, "b g r 1 n"]:
  """Products of one query: a decode step.

  Where keys are yet to be rotated the query is rolled instead of all keys,
  which takes XLA for CPUs half of the time (4225 keys: 0.6 and 1.2 ms of a
  layer, JAX 0.10).
  """
  if rotary is None or place is None:
    return _keys_on_the_left(q, k)
  cosine, sine = rotary.tables(q.shape[-1], place)
  straight = _keys_on_the_left(q, k * cosine[None, None])
  q = jnp.roll(q, q.shape[-1] // 2, axis=-1)
  # Rolled, sines change their sign.
  return straight - _keys_on_the_left(q, k * sine[None, None])


def _keys_on_the_left(
  q: Float[Array, "b g r d"], k: Float[Array, "b g n d"]
) -> Float[Array, "b g r 1 n"]:
  """Products of one query.

  With the keys on the right XLA for CPUs transposes all of them, which takes
  five times as long as the products (8192 keys, JAX 0.10).
  """
  product = jnp.einsum(
    "bgnd,bgrd->bgnr", k, q, preferred_element_type=jnp.float32
  )
  return jnp.swapaxes(product, 2, 3)[:, :, :, None]


def cap(layer: Layer, x: Float[Array, "*a"]) -> Float[Array, "*a"]:
  """The layer's soft cap of logits, if it has one."""
  if layer.soft_cap is None:
    return x
  return layer.soft_cap * jnp.tanh(x / layer.soft_cap)


def softmax(
  x: Float[Array, "*b n"], seen: Bool[Array, "*#b n"]
) -> Float[Array, "*b n"]:
  """Over the last axis where `seen`; a row that sees nothing is all zeros.

  Logits that are not seen may be anything, also NaN.
  """
  return jax.nn.softmax(x, axis=-1, where=seen)


def taken(x: Array, index: Array) -> Array:
  """Rows of each example: `[b, ..., f]` of `x [b, n, f]`.

  Args:
    x: `[b, n, ...]`.
    index: of rows, `[b, ...]`.
  """
  return jax.vmap(lambda x, index: x[index])(x, index)


def mix(
  weight: Float[Array, "b g r t n"], v: Float[Array, "b g n d"]
) -> Float[Array, "b g r t d"]:
  """Weights times values, in the dtype of the values."""
  return jnp.einsum("bgrtn,bgnd->bgrtd", weight.astype(v.dtype), v)


def attended(
  layer: Layer,
  q: Float[Array, "b c h d"],
  k: Float[Array, "b n g d"],
  v: Float[Array, "b n g d"],
  seen: Bool[Array, "b c n"],
) -> Float[Array, "b c h d"]:
  """Attention of rotated queries to what they see of rotated keys."""
  x = logits(layer, split(q, layer.kv_heads), heads_first(k))
  return join(mix(softmax(x, seen[:, None, None]), heads_first(v)))


def moved(
  weight: Float[Array, "*b n"],
  taken: Bool[Array, "*#b n"],
  given: Bool[Array, "*#b n"],
  keep: float,
) -> Float[Array, "*b n"]:
  """Attention that some keys lose goes to others, in proportion to theirs.

  Where the others have none a row stays as it is.

  Args:
    weight: attention.
    taken: keys that keep this part of theirs.
    given: keys that receive the rest.
    keep: see `taken`.
  """
  of = lambda which: jnp.where(which, weight, 0.0).sum(-1)
  other = of(given)
  grow = 1 + (1 - keep) * of(taken) / jnp.where(other > 0, other, 1.0)
  rest = jnp.where(given, grow[..., None], 1.0)
  new = weight * jnp.where(taken, keep, rest)
  return jnp.where((other > 0)[..., None], new, weight)


def part(
  x: Float[Array, "b g r t n"],
  seen: Bool[Array, "b #g #r #t n"],
  v: Float[Array, "b g n d"],
) -> tuple[Float[Array, "b g r t d"], Float[Array, "b g r t"]]:
  """Attention to these keys alone and its log-sum-exp, for `merge`.

  Zero and minus infinity where nothing is seen.
  """
  some = seen.any(axis=-1)
  # Rows that see nothing take zeros, whose gradient is finite.
  safe = jnp.where(seen | ~some[..., None], x, -jnp.inf)
  safe = jnp.where(some[..., None], safe, 0.0)
  lse = jnp.where(some, jax.nn.logsumexp(safe, axis=-1), -jnp.inf)
  return mix(softmax(x, seen), v), lse


def joined_part(
  x: Float[Array, "b g r t n"],
  seen: Bool[Array, "b #g #r #t n"],
  v: Float[Array, "b g n d"],
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
  """`part`, by query heads."""
  out, lse = part(x, seen, v)
  b, g, r, t = lse.shape
  return join(out), lse.reshape(b, g * r, t)


def split(
  x: Float[Array, "b t h d"], kv_heads: int
) -> Float[Array, "b g r t d"]:
  """Query heads by the key head they read."""
  b, t, h, d = x.shape
  return x.reshape(b, t, kv_heads, h // kv_heads, d).transpose(0, 2, 3, 1, 4)


def join(x: Float[Array, "b g r t d"]) -> Float[Array, "b t h d"]:
  """Undoes `split`."""
  b, g, r, t, d = x.shape
  return x.transpose(0, 3, 1, 2, 4).reshape(b, t, g * r, d)


def heads_first(x: Float[Array, "b n g d"]) -> Float[Array, "b g n d"]:
  """Keys or values as caches hold them."""
  return jnp.swapaxes(x, 1, 2)


def visible(
  layer: Layer,
  q_position: Int[Array, "*#b t"],
  k_position: Int[Array, "*#b n"],
  k_valid: Bool[Array, "*#b n"],
) -> Bool[Array, "*b t n"]:
  """Real keys that are not later than the query and within the window."""
  distance = q_position[..., :, None] - k_position[..., None, :]
  seen = (distance >= 0) & k_valid[..., None, :]
  return seen if layer.window is None else seen & (distance < layer.window)


def in_window(layer: Layer, pattern: layouts.Pattern) -> layouts.Pattern:
  """A pattern by place, cut to the layer's window: what `visible` says."""
  if layer.window is None:
    return pattern
  return pattern & layouts.Window(layer.window - 1)


def block_size(layer: Layer, pattern: layouts.Pattern) -> int:
  """Tokens of a block of a layout for the pattern: 128, on a CPU often more.

  Causality alone leaves half of the pairs whatever the size. Products of large
  blocks are faster on a CPU: 2048 tokens took 43 ms with blocks of 512, 52 with
  128, 53 with 1024 (9 heads of 64 features, two cores).
  """
  if aot.platform() != "cpu" or pattern != layouts.Causal():
    return 128
  within = lambda n: layer.window is None or 2 * n <= layer.window
  return next(filter(within, (512, 256)), 128)


def over_rows(
  rows: Callable[[Int[Array, "c"]], Any], t: int, block: int = BLOCK
) -> Any:
  """`rows(numbers of queries)` for blocks of them, joined along axis 1.

  Args:
    rows: from query numbers `[c]` to outputs `[b, c, ...]`, an array or a tree.
    t: number of queries (static).
    block: how many at a time.
  """
  if t <= block:
    return rows(jnp.arange(t))
  blocks = -(-t // block)
  # The last block repeats the last query instead of reading beyond.
  at = jnp.minimum(jnp.arange(blocks * block), t - 1).reshape(blocks, block)

  def joined(out):
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], blocks * block, *out.shape[3:])[:, :t]

  return jax.tree.map(joined, jax.lax.map(forgetful(rows), at))


def forgetful(rows: Callable[..., Any]) -> Callable[..., Any]:
  """The same inside of a loop; gradients compute anew what is in between.

  A loop would keep the logits of all its rounds for them.
  """
  return jax.checkpoint(rows, prevent_cse=False)
