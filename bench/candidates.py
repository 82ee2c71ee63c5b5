"""What is timed: block-sparse attention, and what it is compared with."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bench.clock import Unavailable
from pallas_kernels import block_sparse_attention
from pallas_kernels import layout as layouts
from tokjax.attention import BlockSparse, estimators
from tokjax.binding import bind


@dataclasses.dataclass(frozen=True)
class Candidate:
  """Something to time.

  Attributes:
    name: as the table shows it.
    density: share of all key blocks that it attends to, as listed.
    run: a function without arguments that starts the work.
    wait: blocks until a result is there.
    dense: whether it is what speed-ups are measured against.
  """

  name: str
  density: float
  run: Callable[[], Any]
  wait: Callable[[Any], Any] = jax.block_until_ready
  dense: bool = False


def einsum(q, k, v):
  """Dense attention written out: einsum, softmax, einsum."""
  times = q.shape[2] // k.shape[2]
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  k, v = (jnp.repeat(x, times, axis=1) for x in (k, v))
  s = jnp.einsum("bhid,bhjd->bhij", q, k, preferred_element_type=jnp.float32)
  p = jax.nn.softmax(s * q.shape[-1] ** -0.5).astype(v.dtype)
  return jnp.swapaxes(jnp.einsum("bhij,bhjd->bhid", p, v), 1, 2)


def stock(q, k, v, causal: bool = False):
  """JAX's own attention; cuDNN's kernel on a GPU."""
  on_gpu = jax.default_backend() == "gpu" and q.dtype.itemsize == 2
  return jax.nn.dot_product_attention(
    q, k, v, is_causal=causal, implementation="cudnn" if on_gpu else "xla"
  )


def stock_xla(q, k, v):
  """JAX's own attention, as XLA compiles it."""
  return jax.nn.dot_product_attention(q, k, v, implementation="xla")


DENSE = {"dense": stock, "einsum": einsum}


def timed(name, density, fn, inputs, direction, **options) -> Candidate:
  """A candidate of a function of q, k, v (and more) in one direction.

  Backward is timed alone: from the residuals of a forward pass that was made
  before, to the gradients of q, k and v.
  """
  q, k, v, *rest = inputs
  if direction == "forward":
    run = jax.jit(fn).lower(*inputs).compile()
    return Candidate(name, density, lambda: run(*inputs), **options)
  forward = jax.jit(lambda q, k, v, *rest: jax.vjp(
    lambda q, k, v: fn(q, k, v, *rest), q, k, v
  ))  # fmt: skip
  out, pullback = forward(q, k, v, *rest)
  back = jax.jit(lambda pullback, out: pullback(out))
  back = back.lower(pullback, out).compile()
  return Candidate(name, density, lambda: back(pullback, out), **options)


def sparse(slot: BlockSparse, inputs, direction) -> list[Candidate]:
  """Ours: planning and attention, and each alone.

  In backward the plan is made already, so that only attention is timed.
  """
  layout = jax.block_until_ready(jax.jit(plan(slot))(*inputs))
  density = float(jnp.mean(layout.density()))
  attend = attention(slot.implementation)
  alone = timed("attention", density, attend, (*inputs, layout), direction)
  if direction == "backward":
    return [alone]
  whole = lambda q, k, v: attend(q, k, v, plan(slot)(q, k, v))
  return [
    timed("planned", density, whole, inputs, direction),
    alone,
    timed("plan", density, plan(slot), inputs, direction),
  ]


def plan(slot: BlockSparse):
  """The function of q, k and v that chooses the blocks."""
  heads = lambda x: jnp.swapaxes(x, 1, 2)
  return lambda q, k, v: slot.layout(heads(q), heads(k))


def attention(implementation: str | None):
  """The function of q, k, v and a layout."""
  return functools.partial(
    block_sparse_attention, implementation=implementation
  )


def splash(inputs, direction, block: int) -> Candidate:
  """JAX's splash attention with everything visible, on a TPU.

  Raises:
    Unavailable: elsewhere.
  """
  if jax.default_backend() != "tpu":
    raise Unavailable("splash attention runs on a TPU")
  return timed(
    "splash", 1.0, splash_attention(inputs, block), inputs, direction,
    dense=True,
  )  # fmt: skip


def splash_attention(inputs, block: int, **options):
  """The function of q, k, v; `options` are those of `make_splash_mha`."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  q, k, _ = inputs
  names = (
    "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv "
    "block_kv_dkv_compute block_q_dq block_kv_dq"
  )
  make = kernel.make_splash_mha if q.shape[2] == k.shape[2] else (
    kernel.make_splash_mqa
  )  # fmt: skip
  times = q.shape[2] // k.shape[2]
  mask = masks.FullMask((q.shape[1], k.shape[1]))
  run = make(
    masks.MultiHeadMask([mask] * (q.shape[2] if times == 1 else times)),
    head_shards=1, q_seq_shards=1,
    block_sizes=kernel.BlockSizes(**dict.fromkeys(names.split(), block)),
    **options,
  )  # fmt: skip

  def attend(q, k, v):
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    q = q * q.shape[-1] ** -0.5
    if times > 1:
      q = q.reshape(q.shape[0], k.shape[1], times, *q.shape[2:])
      out = jax.vmap(jax.vmap(run))(q, k, v)
      out = out.reshape(out.shape[0], -1, *out.shape[3:])
    else:
      out = jax.vmap(run)(q, k, v)
    return jnp.swapaxes(out, 1, 2)

  return attend


def dense(name: str, inputs, direction, max_bytes: float) -> Candidate:
  """One of `DENSE`.

  Raises:
    Unavailable: if the compiled program wants more memory than `max_bytes`.
  """
  fn = DENSE[name]
  if direction == "backward":
    total = lambda *x: jnp.sum(fn(*x).astype(jnp.float32))
    probe = jax.jit(jax.grad(total, (0, 1, 2)))
  else:
    probe = jax.jit(fn)
  needed = probe.lower(*inputs).compile().memory_analysis()
  needed = needed.temp_size_in_bytes if needed is not None else 0
  if needed > max_bytes:
    raise Unavailable(
      f"needs {needed / 2**30:.1f} GiB in addition to its inputs, at most"
      f" {max_bytes / 2**30:.1f} GiB are allowed (config.max_gib)"
    )
  return timed(name, 1.0, fn, inputs, direction, dense=name == "dense")


def slot_of(config, length: int, density: float) -> BlockSparse:
  """The slot that lists a share of the blocks, by the config's estimator."""
  estimator = getattr(estimators, config.estimator)
  options = dict(config.estimator_options)
  blocks = -(-length // config.block)
  return BlockSparse(
    bind(estimator, **options) if options else estimator,
    layouts.TopK(max(1, round(density * blocks))),
    config.block, config.block, implementation=config.implementation,
  )  # fmt: skip


def random_inputs(config, batch: int, length: int, head_size: int):
  """q, k and v of a seed, in the config's dtype."""
  shapes = [
    (batch, length, n, head_size)
    for n in (config.heads, config.key_heads, config.key_heads)
  ]
  make = functools.partial(jax.random.normal, dtype=jnp.dtype(config.dtype))
  keys = jax.random.split(jax.random.key(0), 3)
  return tuple(make(key, s) for key, s in zip(keys, shapes, strict=True))
