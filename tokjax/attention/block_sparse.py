"""Block-sparse attention for the `attend` slot: estimate, choose, attend.

`BlockSparse` fills the slot of encoders; `CausalBlockSparse` that of decoders.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import block_sparse_attention
from pallas_kernels import layout as layouts
from tokjax.attention import core, estimators
from tokjax.attention.causal import Causal
from tokjax.layer import Arrivals, Layer, Memory

Rule = layouts.TopK | layouts.TopP | layouts.Threshold


@dataclasses.dataclass(frozen=True)
class BlockSparse:
  """Each block of queries sees the key blocks that a rule picks, per head.

  The choice is made inside jit for every call; it has no gradient, the
  attention over what was chosen has. Bias and mask work in the kernel: nothing
  of size queries times keys is held. With every block chosen this is dense
  attention, or causal dense attention with `pattern=Causal()`.

  Attributes:
    estimator: see `tokjax.attention.estimators`; hashable.
    rule: `TopK(k)`, `TopP(p, capacity)` or `Threshold(value, capacity)` of
      `pallas_kernels.layout`, on the estimated shares of a query block's
      attention, which sum to 1.
    block_q, block_k: block sizes in tokens. 128 and its multiples suit
      accelerators; a rule's numbers count such blocks.
    pattern: nothing outside it is chosen or seen.
    keep: blocks that are always chosen (inside the pattern), such as
      `Sinks(1) | Window(128)`; they count towards the rule's capacity.
    implementation: of `block_sparse_attention`; None picks by platform.
  """

  estimator: Callable[..., Any] = estimators.mean_pooled
  rule: Rule = layouts.TopK(8)
  block_q: int = 128
  block_k: int = 128
  pattern: layouts.Pattern = layouts.Full()
  keep: layouts.Pattern | None = None
  implementation: str | None = None

  def __post_init__(self):
    for name in ("block_q", "block_k"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")

  def __call__(
    self,
    q: Float[Array, "b h m d"],
    k: Float[Array, "b g n d"],
    v: Float[Array, "b g n e"],
    *,
    bias: Float[Array, "b n"] | None = None,
    mask: Bool[Array, "b n"] | None = None,
    policy: Float[Array, "b n"] | None = None,
  ) -> Float[Array, "b h m e"]:
    """Attention of queries to the keys of chosen blocks.

    Args:
      q, k, v: queries, keys and values; g divides h.
      bias: added to the logits of every key (log sizes).
      mask: False for keys that are hidden, whatever is stored there. Where
        there are as many queries, it leaves them out of the choice too.
      policy: must be None: a policy weights pairs one by one.

    Returns:
      Outputs in the dtype of q.
    """
    if policy is not None:
      raise ValueError(
        "BlockSparse cannot weight keys by a policy (DynamicViT in training);"
        " leave out attend= or train with another recipe"
      )
    if mask is not None:
      hidden = lambda x: jnp.where(mask[:, None, :, None], x, 0)
      k, v = hidden(k), hidden(v)
    layout = self.layout(q, k, bias=bias, mask=mask)
    if mask is not None:
      bias = jnp.zeros(mask.shape) if bias is None else bias
      bias = jnp.where(mask, bias, -jnp.inf)
    first = lambda x: jnp.swapaxes(x, 1, 2)
    out = block_sparse_attention(
      first(q), first(k), first(v), layout,
      bias=None if bias is None else bias[:, None, :],
      implementation=self.implementation,
    )  # fmt: skip
    return first(out)

  def layout(
    self,
    q: Float[Array, "b h m d"],
    k: Float[Array, "b g n d"],
    *,
    bias: Float[Array, "b n"] | None = None,
    mask: Bool[Array, "b n"] | None = None,
  ) -> layouts.BlockLayout:
    """Who sees whom: the `BlockLayout` of a call, one per example and head."""
    shares = jax.vmap(self.shares)(*jax.lax.stop_gradient((q, k, bias, mask)))
    return layouts.from_scores(
      shares, self.rule, q_len=q.shape[2], k_len=k.shape[2],
      block_q=self.block_q, block_k=self.block_k, pattern=self.pattern,
      keep=self.keep,
    )  # fmt: skip

  def shares(
    self,
    q: Float[Array, "h m d"],
    k: Float[Array, "g n d"],
    bias: Float[Array, "n"] | None = None,
    mask: Bool[Array, "n"] | None = None,
  ) -> Float[Array, "h i j"]:
    """Estimated shares of each query block's attention, of one example.

    The mask is that of the queries too where there are as many as keys.
    """
    m, n = q.shape[1], k.shape[1]
    given = estimators.Blocked(
      q=q, k=k, block_q=self.block_q, block_k=self.block_k, bias=bias,
      q_mask=mask if m == n else None, k_mask=mask, pattern=self.pattern,
    )  # fmt: skip
    found = self.estimator(given)
    kinds = layouts.block_kinds(self.pattern, self.block_q, self.block_k, m, n)
    return estimators.share(found, jnp.asarray(kinds > 0))


@dataclasses.dataclass(frozen=True)
class CausalBlockSparse(Causal):
  """`BlockSparse` in a decoder: for prompts; decoded tokens see everything.

  Attributes:
    blocks: what is chosen and how; its pattern is set to the causal one, cut to
      the window of each layer.
  """

  blocks: BlockSparse = BlockSparse()

  @property
  def whole(self) -> bool:
    return True

  def layout(self, layer: Layer, arrivals: Arrivals, memory: Memory):
    """The chosen blocks of a prompt, one choice per example and query head."""
    causal = core.in_window(layer, layouts.Causal())
    chooser = dataclasses.replace(self.blocks, pattern=causal)
    # Estimators scale products by D ** -0.5.
    scale = layer.factor * layer.head_dim**0.5
    q = layer.rotate(arrivals.q, arrivals.position) * scale
    k = layer.rotate(memory.k, memory.position)
    first = core.heads_first
    return chooser.layout(first(q), first(k), mask=memory.valid)

  def seen(self, layer, arrivals, memory):
    causal = super().seen(layer, arrivals, memory)
    shown = self.layout(layer, arrivals, memory).to_dense()
    return lambda at: causal(at) & shown[:, :, at]
