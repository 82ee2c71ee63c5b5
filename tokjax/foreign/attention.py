"""Block-sparse attention for modules that take an attention function."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import BlockLayout, block_sparse_attention
from pallas_kernels import layout as layouts
from tokjax.attention.block_sparse import BlockSparse


@dataclasses.dataclass(frozen=True)
class BlockSparseAttention:
  """Attention over key blocks, as `attention_fn=` of Flax Linen and Flax NNX.

  Attributes:
    sees: who sees whom: a pattern of `pallas_kernels.layout`, whose layout is
      made for the length of each call; a `BlockLayout`, for its own length (its
      arrays make the attention unhashable); or a
      `tokjax.attention.BlockSparse`, which chooses by estimated attention.
    block: block size of a pattern's layout, in tokens.
    implementation: of `pallas_kernels.block_sparse_attention`, for patterns
      and layouts; None picks by platform.
  """

  sees: Any
  block: int = 128
  implementation: str | None = None

  def __post_init__(self):
    if not isinstance(self.sees, layouts.Pattern | BlockLayout | BlockSparse):
      raise ValueError(
        f"sees={self.sees!r}: must be a pattern of pallas_kernels.layout, a"
        " BlockLayout or a tokjax.attention.BlockSparse"
      )
    if self.block < 1:
      raise ValueError(f"block={self.block}: must be 1 or more")

  def __call__(
    self,
    query: Float[Array, "b m h k"],
    key: Float[Array, "b n g k"],
    value: Float[Array, "b n g e"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    is_causal: bool = False,
    **options: Any,
  ) -> Float[Array, "b m h e"]:
    """Attention of queries to the keys that they see.

    Args:
      query, key, value: g divides h.
      bias: added to the logits of a key, `[b or 1, 1, 1, n]`.
      mask: False for keys that are hidden, `[b or 1, 1, 1, n]`.
      dropout_rate, deterministic: there is no dropout of attention.
      is_causal: with a pattern, its causal part.
      **options: further arguments of Flax; those that change what is computed
        must be at their defaults.

    Raises:
      ValueError: what a layout cannot carry out.
    """
    _check_options(dropout_rate, deterministic, options)
    b, n = key.shape[:2]
    bias = _of_keys("bias", bias, b, n)
    mask = _of_keys("mask", mask, b, n)
    if isinstance(self.sees, BlockSparse):
      _refuse_causal(is_causal, "BlockSparse: give it pattern=Causal()")
      first = lambda x: jnp.swapaxes(x, 1, 2)
      out = self.sees(first(query), first(key), first(value), bias=bias,
                      mask=mask)  # fmt: skip
      return first(out)
    if mask is not None:
      hidden = lambda x: jnp.where(mask[:, :, None, None], x, 0)
      key, value = hidden(key), hidden(value)
      bias = jnp.where(mask, 0.0 if bias is None else bias, -jnp.inf)
    return block_sparse_attention(
      query, key, value, self._layout(query.shape[1], n, is_causal),
      bias=None if bias is None else bias[:, None, :],
      implementation=self.implementation,
    )  # fmt: skip

  def _layout(self, q_len: int, k_len: int, causal: bool) -> BlockLayout:
    sees = self.sees
    if isinstance(sees, BlockLayout):
      _refuse_causal(causal, "a BlockLayout: build it from a causal pattern")
      return sees
    if causal:
      sees = sees & layouts.Causal()
    return layouts.from_pattern(
      sees, q_len=q_len, k_len=k_len, block_q=self.block, block_k=self.block
    )


def _check_options(rate, deterministic, options) -> None:
  if rate and not deterministic:
    raise ValueError(
      f"dropout_rate={rate}: block-sparse attention has no dropout; use"
      " dropout_rate=0 or deterministic=True"
    )
  # Arguments that say how attention is computed, and not what it is.
  plain = {"dropout_rng", "broadcast_dropout", "dtype", "precision",
           "force_fp32_for_softmax", "promote_dtype"}  # fmt: skip
  for name, value in options.items():
    if name not in plain and value is not None:
      raise ValueError(
        f"{name}={value!r}: block-sparse attention does not have this option;"
        " leave it at its default"
      )


def _refuse_causal(causal: bool, instead: str) -> None:
  if causal:
    raise ValueError(f"is_causal=True does not change {instead}")


def _of_keys(name: str, x: Array | None, b: int, n: int) -> Array | None:
  """A bias or mask of keys alone as `[b, n]`."""
  if x is None:
    return None
  if x.ndim != 4 or x.shape[1:] != (1, 1, n) or x.shape[0] not in (1, b):
    raise ValueError(
      f"{name} has shape {x.shape}, must be [{b} or 1, 1, 1, {n}]: pairs are"
      " hidden by the layout or the pattern"
    )
  return jnp.broadcast_to(x[:, 0, 0], (b, n))
