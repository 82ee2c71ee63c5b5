"""Core Context Aware Attention: a window, and one core token for each group.

The text is cut into groups. A group's core is the mean of its tokens, weighted
by the attention of the group's last query, for each query head. A query sees
the cores of early groups and, exactly, the tokens of the groups behind them, in
one softmax; every token is seen once, itself or in its core.

Chen et al., 2024 (arXiv 2412.12465); checked against chenyaofo/CCA-Attention:
codebase/core/cca_attn.py, cca_pooling.py (052cc8e; later commits hold a page
alone). As there, a core is a mean of rotated keys and of values, each query
head's own; the paper has a mean of inputs, which is projected. Not copied: the
first two layers of the official cache hold all tokens, of which it makes each
further core of the first ones again.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import budgets
from tokjax.attention import core
from tokjax.attention.causal import Causal, need_whole
from tokjax.budgets import Budget
from tokjax.layer import NOTES, Arrivals, Layer, Memory

DENSE = Causal()
# Queries that share a slice of tokens: the smaller, the fewer are masked.
ROWS = 128
# What `Cores` of the cache is given of a prompt.
Cores = tuple[Float[Array, "b g r m d"], Float[Array, "b g r m d"]]


@dataclasses.dataclass(frozen=True)
class CoreContext(Causal):
  """See the module. Sliding layers see their window.

  Attributes:
    group: tokens a group.
    local: last tokens that a query sees exactly, at least; up to `group - 1`
      more complete the group that they begin in.
    weighted: cores are weighted means; False: plain ones, to compare with.
  """

  group: int = 16
  local: Budget = budgets.Count(1024)
  weighted: bool = True

  def __post_init__(self):
    if self.group < 1:
      raise ValueError(f"group={self.group}: must be 1 or more")

  @property
  def whole(self) -> bool:
    return True

  @property
  def leaves_notes(self) -> str:
    return "cores"

  def with_keep(self, keep: float) -> "CoreContext":
    return dataclasses.replace(self, local=self.local.with_keep(keep))

  def most(self, layer: Layer, prompt: int) -> int:
    """Exact tokens that a query sees, at most (static)."""
    counts = layer.ask(budgets.table, self.local, prompt)
    return int(counts.max()) + self.group

  def early(
    self, place: Int[Array, "..."], local: Int[Array, "..."]
  ) -> Int[Array, "..."]:
    """Groups that queries at these places see as cores."""
    return jnp.maximum((place + 1 - local) // self.group, 0)

  def cores(
    self,
    layer: Layer,
    q: Float[Array, "b m h d"],
    k: Float[Array, "b m s g d"],
    v: Float[Array, "b m s g d"],
    position: Int[Array, "b m s"],
  ) -> Cores:
    """Rotated keys, and values, of complete groups.

    Args:
      layer: where it is.
      q: of the last token of each group, before rotation.
      k, v: of the tokens of each group, before rotation.
      position: of those.
    """
    turned = layer.rotate(k, position)
    q = layer.rotate(q[:, :, None], position[:, :, -1:])[:, :, 0]
    q = q.reshape(*q.shape[:2], layer.kv_heads, layer.group, q.shape[-1])
    x = jnp.einsum(
      "bmgrd,bmsgd->bgrms", q, turned, preferred_element_type=jnp.float32
    )
    x = core.cap(layer, x * layer.factor)
    weight = jax.nn.softmax(x if self.weighted else jnp.zeros_like(x), axis=-1)
    mean = lambda x: jnp.einsum("bgrms,bmsgd->bgrmd", weight.astype(x.dtype), x)
    return mean(turned), mean(v)

  def attended(
    self,
    layer: Layer,
    q: Float[Array, "b g r t d"],
    cores: Cores,
    cores_seen: Bool[Array, "b t m"],
    k: Float[Array, "b g n d"],
    v: Float[Array, "b g n d"],
    seen: Bool[Array, "b t n"],
  ) -> Float[Array, "b g r t d"]:
    """One softmax of rotated queries over cores and tokens."""
    far = jnp.einsum(
      "bgrtd,bgrmd->bgrtm", q, cores[0], preferred_element_type=jnp.float32
    )
    far = core.cap(layer, far * layer.factor)
    far = jnp.where(cores_seen[:, None, None], far, -jnp.inf)
    near = jnp.where(seen[:, None, None], core.logits(layer, q, k), -jnp.inf)
    # In two parts: joined logits would be written and read once more.
    top = jnp.maximum(
      far.max(axis=-1, keepdims=True), near.max(axis=-1, keepdims=True)
    )
    # A row that sees nothing has weights, and a sum of them, of 0.
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    far, near = jnp.exp(far - top), jnp.exp(near - top)
    total = far.sum(axis=-1, keepdims=True) + near.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bgrtm,bgrmd->bgrtd", far.astype(v.dtype), cores[1])
    out = (out + core.mix(near, v)) / jnp.where(total > 0, total, 1.0)
    return out.astype(v.dtype)

  def __call__(self, layer, arrivals, memory, *, params, carry):
    if layer.window is not None:
      return DENSE(layer, arrivals, memory, params=params, carry=carry)
    a = arrivals.clean()
    need_whole(self, a, memory)
    cores = self._of_prompt(layer, a, memory)
    out = self._by_rows(layer, a, memory, cores)
    carry = {**carry, NOTES: {"cores": cores}}
    return self.finish(layer, out, a, params), carry

  def _of_prompt(self, layer: Layer, a: Arrivals, memory: Memory) -> Cores:
    """Of all groups that fit a prompt, one at least; some are not complete."""
    s, n = self.group, memory.k.shape[1]
    more = max(s - n, 0)
    full = max(n // s, 1) * s

    def cut(x):
      x = jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))
      return x[:, :full].reshape(len(x), -1, s, *x.shape[2:])

    k, v, position = map(cut, (memory.k, memory.v, memory.position))
    return self.cores(layer, cut(a.q)[:, :, -1], k, v, position)

  def _by_rows(self, layer, a, memory, cores):
    """Blocks of queries, each with the slice of tokens in their reach."""
    t = a.q.shape[1]
    q = core.split(layer.rotate(a.q, a.position), layer.kv_heads)
    k = core.heads_first(layer.rotate(memory.k, memory.position))
    v = core.heads_first(memory.v)
    local = budgets.counts(self.local, layer, a.valid)[:, None]
    rows = min(t, ROWS)
    reach = self.most(layer, t)
    wide = min(t, rows + reach)
    number = jnp.arange(cores[0].shape[3])[None, None]

    def of_rows(at):
      start = jnp.clip(at[0] - reach, 0, t - wide)
      cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, wide, 2)
      place = start + jnp.arange(wide)[None, None]
      early = self.early(at[None], local)[:, :, None]
      seen = (place >= early * self.group) & (place <= at[None, :, None])
      real = jax.lax.dynamic_slice_in_dim(memory.valid, start, wide, 1)
      out = self.attended(
        layer, q[:, :, :, at], cores, number < early,
        cut(k), cut(v), seen & real[:, None],
      )  # fmt: skip
      return core.join(out)

    return core.over_rows(of_rows, t, ROWS)
