"""Causal attention of a decoder, and what methods may change in it.

`Causal` is dense attention and the base of the `attend` slot's methods: most
override one of its hooks, each of which says what it changes. The hooks also
act when decoding, where a cache calls them on its own entries.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import BlockLayout, block_sparse_attention
from pallas_kernels import layout as layouts
from pallas_kernels.decode_attention.merge import merge
from tokjax.attention import core
from tokjax.layer import LSE, Arrivals, Carry, Layer, Memory, Params

# The most pairs of prompts whose mask is held to find the blocks in it (about
# three times, a byte each): 11 thousand tokens of one text.
MASK = 2**27
# What a method leaves alone that changes no more than masks and outputs.
BEYOND_MASKS = ("products", "bias", "weights", "__call__")


@dataclasses.dataclass(frozen=True)
class Causal:
  """Every query sees itself and what came before.

  Class attributes that methods override:
    needs: parts of `Arrivals` it reads in addition to queries, keys and
      values.
    whole: it looks at a whole prompt at once, which cannot come in chunks.
  """

  @property
  def needs(self) -> tuple[str, ...]:
    return ()

  @property
  def whole(self) -> bool:
    return False

  @property
  def per_head(self) -> bool:
    """Whether hooks tell query heads apart when decoding."""
    return False

  @property
  def leaves_notes(self) -> str:
    """What it leaves to the cache: "keys" (on each), "cores"; "": nothing."""
    return ""

  def parameters(self, layer: Layer, width: int, key) -> Any:
    """Nothing is learned."""
    return None

  def check(self, layer: Layer, prompt: int) -> None:
    """Raises ValueError for what cannot be, with the reason and the fix."""

  # Hooks.

  def seen(
    self, layer: Layer, arrivals: Arrivals, memory: Memory
  ) -> Callable[[Array], Bool[Array, "b #h c n"]]:
    """The function from query numbers `[c]` to the keys that they see."""

    def rows(at):
      position = arrivals.position[:, at]
      seen = core.visible(layer, position, memory.position, memory.valid)
      return seen[:, None]

    return rows

  def bias(
    self, layer: Layer, position: Int[Array, "b #g n"]
  ) -> Float[Array, "b g r n"] | None:
    """Added to the logits of keys at these positions, for each query head."""
    return None

  def finish(
    self, layer: Layer, out: Array, arrivals: Arrivals, params: Params
  ) -> Float[Array, "b t h d"]:
    """The heads' outputs `[b, t, H, D]` as they go on."""
    return out

  def rescale(
    self, layer: Layer, weight: Array, notes: dict[str, Array]
  ) -> Float[Array, "b g r t n"]:
    """Softmax weights of a decoded token, from `notes` of the prompt."""
    return weight

  def products(
    self, layer: Layer, arrivals: Arrivals, memory: Memory
  ) -> Callable[[Array], Float[Array, "b g r c n"]]:
    """The function from query numbers `[c]` to their logits."""
    q = core.split(layer.rotate(arrivals.q, arrivals.position), layer.kv_heads)
    k = core.heads_first(layer.rotate(memory.k, memory.position))
    return lambda at: core.logits(layer, q[:, :, :, at], k)

  def weights(
    self, layer: Layer, arrivals: Arrivals, memory: Memory
  ) -> Callable[[Array], Float[Array, "b g r c n"]]:
    """The function from query numbers `[c]` to their attention."""
    product = self.products(layer, arrivals, memory)
    seen = self.seen(layer, arrivals, memory)
    bias = self.bias(layer, memory.position[:, None])
    gate = arrivals.gate

    def rows(at):
      x = product(at)
      if bias is not None:
        x = x + bias[:, :, :, None]
      if gate is not None:
        x = x + jnp.log(jnp.maximum(gate, 1e-6))[:, None, None, None]
      return core.softmax(x, by_group(layer, seen(at)))

    return rows

  def layout(
    self, layer: Layer, arrivals: Arrivals, memory: Memory
  ) -> BlockLayout | None:
    """What `seen` shows, as blocks, where a kernel can skip the others.

    By place in a prompt that arrives whole and whose padding comes last; None:
    there are no such blocks. Methods that change more than masks have none.
    """
    t = arrivals.q.shape[1]
    pattern = self.pattern(layer, t)
    if pattern is None:
      rows = self.shown(layer, arrivals, memory)
      mask = None if rows is None else rows(jnp.arange(t))
      few = mask is not None and mask.size <= MASK
      return layouts.from_mask(mask) if few else None
    size = core.block_size(layer, pattern)
    pattern = core.in_window(layer, pattern)
    return layouts.from_pattern(pattern, q_len=t, block_q=size, block_k=size)

  def pattern(self, layer: Layer, tokens: int) -> layouts.Pattern | None:
    """What any prompt of `tokens` shows; None: that depends on the prompt."""
    return layouts.Causal() if type(self) is Causal else None

  def shown(
    self, layer: Layer, arrivals: Arrivals, memory: Memory
  ) -> Callable[[Array], Bool[Array, "b #h c n"]] | None:
    """What blocks show where that depends on the prompt, as `seen`.

    None: the method changes more than masks.
    """
    if changed(self, BEYOND_MASKS):
      return None
    return self.seen(layer, arrivals, memory)

  def by_blocks(
    self, layer: Layer, layout: BlockLayout, arrivals: Arrivals, memory: Memory
  ) -> Float[Array, "b t h d"]:
    """Attention over the blocks that a layout lists, and nothing else."""
    return listed(layer, layout, arrivals, memory)[0]

  def _by_its_blocks(
    self, layer: Layer, arrivals: Arrivals, memory: Memory
  ) -> Float[Array, "b t h d"]:
    """`by_blocks` of its own layout, of which there is one."""
    layout = self.layout(layer, arrivals, memory)
    assert layout is not None
    return self.by_blocks(layer, layout, arrivals, memory)

  # The slot.

  def __call__(
    self,
    layer: Layer,
    arrivals: Arrivals,
    memory: Memory,
    *,
    params: Params,
    carry: Carry,
  ) -> tuple[Float[Array, "b t h d"], Carry]:
    """See `tokjax.slots.Attend`."""
    arrivals = arrivals.clean()
    if self.whole:
      need_whole(self, arrivals, memory)
    t, layout = arrivals.q.shape[1], None
    # Blocks go by place; without a window causality is the same by position.
    ordered = type(self) is Causal and layer.window is None
    if t >= core.LONG and t == memory.k.shape[1] and arrivals.gate is None:
      if ordered or not arrivals.gaps:
        layout = self.layout(layer, arrivals, memory)
    if layout is not None and type(self) is Causal:
      out, lse = listed(layer, layout, arrivals, memory)
      carry = {**carry, LSE: lse}
    elif layout is not None and layout.partial_mask is not None:
      # Gradients find the mask anew: every layer would keep one.
      out = jax.checkpoint(self._by_its_blocks, static_argnums=0)(
        layer, arrivals, memory
      )
    elif layout is not None:
      out = self.by_blocks(layer, layout, arrivals, memory)
    else:
      weights = self.weights(layer, arrivals, memory)
      v = core.heads_first(memory.v)
      rows = lambda at: core.join(core.mix(weights(at), v))
      out = core.over_rows(rows, t)
    return self.finish(layer, out, arrivals, params), carry


def changed(attend: Causal, hooks: Sequence[str]) -> list[str]:
  """Those of the hooks that a method has of its own."""
  own = lambda name: getattr(type(attend), name)
  return [name for name in hooks if own(name) is not getattr(Causal, name)]


def listed(
  layer: Layer, layout: BlockLayout, arrivals: Arrivals, memory: Memory
) -> tuple[Float[Array, "b t h d"], Float[Array, "b h t"]]:
  """Outputs of the pairs a layout lists, and their log-sum-exp."""
  found: Any = block_sparse_attention(
    layer.rotate(arrivals.q, arrivals.position),
    layer.rotate(memory.k, memory.position),
    memory.v,
    layout,
    scale=layer.factor,
    soft_cap=layer.soft_cap,
    return_lse=True,
  )
  return found


def with_others(
  found: tuple[Float[Array, "b t h d"], Float[Array, "b h t"]],
  others: tuple[Float[Array, "b t h d"], Float[Array, "b h t"]],
) -> Float[Array, "b t h d"]:
  """Attention to listed pairs and to others, from what either gives alone."""
  outs, lses = zip(found, others, strict=True)
  out = jnp.stack([x.astype(outs[0].dtype) for x in outs])
  return merge(out, jnp.swapaxes(jnp.stack(lses), 2, 3))[0]


def by_group(layer: Layer, x: Array) -> Array:
  """`[b, H or 1, ...]` as `[b, G, r, ...]`, or with two ones."""
  b, h, *rest = x.shape
  if h == 1:
    return x[:, None]
  return x.reshape(b, layer.kv_heads, layer.group, *rest)


def need_whole(attend: Any, arrivals: Arrivals, memory: Memory) -> None:
  """Raises where a method that looks at a whole prompt is given a chunk."""
  if arrivals.q.shape[1] != memory.k.shape[1]:
    raise ValueError(
      f"{type(attend).__name__} looks at a whole prompt at once, but was given"
      f" a chunk of {arrivals.q.shape[1]} of {memory.k.shape[1]} tokens;"
      " prefill in one chunk"
    )
