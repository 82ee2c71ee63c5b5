"""Decoder-only language models: Llama, Mistral, Qwen and Gemma.

One pre-norm transformer with the slots `attend` and `cache`; families differ
by configuration only. A whole sequence is a plain call,

    logits, out = model.apply({"params": params}, tokens, mask=mask)

and text is made by `prefill` and `decode` over states of the cache, which
`tokjax.models.prefill` makes and `tokjax.models.generation` carries on.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokjax.attention.causal import Causal
from tokjax.attention.padding import RealFirst
from tokjax.cache import contract
from tokjax.cache.contract import Arrivals, Attend, Carry, Layer, Memory
from tokjax.cache.kv import KV
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.decoder_layers import GatedMlp, Projections, norm
from tokjax.reduce.reduction import Slots

States = tuple[Any, ...]


class Rows(NamedTuple):
  """Tokens on their way through the blocks.

  Attributes:
    x: hidden states, `[b, t, d]`.
    token, position, valid: see `tokjax.cache.contract.Arrivals`.
  """

  x: Float[Array, "b t d"]
  token: Int[Array, "b t"]
  position: Int[Array, "b t"]
  valid: Bool[Array, "b t"]


class Block(nn.Module):
  """Norm, attention, norm, MLP; what attention sees and keeps is a slot's.

  Attributes:
    config: the architecture.
    slots: how the slots are filled.
    layer: what slots are told of this block.
    dtype: of activations.
  """

  config: DecoderConfig
  slots: Slots
  layer: Layer
  dtype: Any

  def setup(self):
    cfg = self.config
    make = lambda: norm(cfg, self.dtype)
    self.norm1, self.norm2 = make(), make()
    if cfg.post_norms:
      self.post_norm1, self.post_norm2 = make(), make()
    self.attention = Projections(cfg, self.dtype)
    self.mlp = GatedMlp(cfg, self.dtype)
    learned = lambda key: contract.parameters(
      attend_of(self.slots), cache_of(self.slots), self.layer, cfg.width, key
    )
    # An entry without arrays would be one more thing in every checkpoint.
    some = jax.tree.leaves(jax.eval_shape(learned, jax.random.key(0)))
    self.learned = self.param("slots", learned) if some else {}

  def forward(self, rows: Rows, carry: Carry) -> tuple[Rows, Carry, Arrivals]:
    """A whole sequence, of which nothing is remembered."""
    arrivals = self._arrive(rows)
    y, carry = attend_of(self.slots)(
      self.layer,
      arrivals,
      Memory.of(arrivals),
      params=unfreeze(self.learned),
      carry=carry,
    )
    return self._leave(rows, y), carry, arrivals

  def prefill(self, rows: Rows, state: Any, carry: Carry, last: bool):
    """A chunk of prompts; returns rows, state, carry and arrivals."""
    arrivals = self._arrive(rows)
    y, state, carry = cache_of(self.slots).prefill(
      self.layer,
      state,
      arrivals,
      attend=attend_of(self.slots),
      params=unfreeze(self.learned),
      carry=carry,
      last=last,
    )
    return self._leave(rows, y), state, carry, arrivals

  def decode(self, rows: Rows, state: Any, carry: Carry):
    """One token of each example; returns rows, state and carry."""
    y, state, carry = cache_of(self.slots).decode(
      self.layer,
      state,
      self._arrive(rows),
      attend=attend_of(self.slots),
      params=unfreeze(self.learned),
      carry=carry,
    )
    return self._leave(rows, y), state, carry

  def _arrive(self, rows: Rows) -> Arrivals:
    y = self.norm1(rows.x)
    needs = (*attend_of(self.slots).needs, *cache_of(self.slots).needs)
    return Arrivals(
      *self.attention(y),
      position=rows.position,
      valid=rows.valid,
      token=rows.token if "token" in needs else None,
      x=y if "x" in needs else None,
    )

  def _leave(self, rows: Rows, y) -> Rows:
    post = self.config.post_norms
    y = self.attention.output(y)
    x = rows.x + (self.post_norm1(y) if post else y)
    y = self.mlp(self.norm2(x))
    return rows._replace(x=x + (self.post_norm2(y) if post else y))


class Decoder(nn.Module):
  """A language model built with slots.

  Attributes:
    config: the architecture.
    slots: what a recipe returned; `Slots()` is the plain model.
    dtype: of activations and caches; parameters stay float32.
  """

  config: DecoderConfig
  slots: Slots = Slots()
  dtype: Any = jnp.float32

  def __post_init__(self):
    super().__post_init__()
    slots = self.slots
    foreign = [
      name
      for name in ("reduce", "program", "proportional", "pool_by_size")
      if getattr(slots, name)
    ]
    if slots.attend is not None and not isinstance(slots.attend, Attend):
      foreign.append("attend")
    if foreign:
      raise ValueError(
        f"recipe {slots.name!r} fills {', '.join(foreign)} for an encoder; a"
        " decoder takes recipes of the families 'llm' and 'cache'"
      )

  def setup(self):
    cfg = self.config
    self.embed = nn.Embed(cfg.vocabulary, cfg.width, dtype=self.dtype)
    self.blocks = [
      Block(cfg, self.slots, layer, self.dtype, name=f"block_{layer.index}")
      for layer in self.layers
    ]
    self.norm = norm(cfg, self.dtype)
    if not cfg.tied:
      self.head = nn.Dense(cfg.vocabulary, use_bias=False, dtype=self.dtype)

  @property
  def layers(self) -> tuple[Layer, ...]:
    """What the slots are told of each block."""
    return layers_of(self.config, self.dtype)

  def __call__(
    self,
    tokens: Int[Array, "b n"],
    *,
    mask: Bool[Array, "b n"] | None = None,
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "b n v"], dict[str, Any]]:
    """Logits of the token after each one.

    Args:
      tokens: ids.
      mask: False for padding, wherever it stands; None: all are real. Real
        tokens are the same text with or without it; what comes out at padding
        means nothing.
      key, train: as other backbones take them; nothing here is random.

    Returns:
      logits, float32, and `out`: "features" (normed, `[b, n, d]`).
    """
    del key, train
    valid, order = jnp.ones(tokens.shape, bool), None
    if mask is not None:
      # Attention counts by place, with padding behind the real tokens.
      order = RealFirst.of(mask)
      tokens, valid = order.apply(tokens), order.apply(mask)
    rows, carry = self.enter(tokens, positions_of(valid), valid), {}
    for block in self.blocks:
      rows, carry, _ = block.forward(rows, carry)
    x = self.norm(rows.x)
    if order is not None:
      x = order.undo(x)
    return self.logits(x), {"features": x}

  def enter(
    self,
    token: Int[Array, "b t"],
    position: Int[Array, "b t"],
    valid: Bool[Array, "b t"],
  ) -> Rows:
    """Embeds tokens; for those who call the blocks themselves."""
    x = self.embed(token)
    if self.config.embed_scale:
      x = x * jnp.asarray(self.config.width**0.5, x.dtype)
    return Rows(x, token, position, valid)

  def prefill(
    self,
    rows: Rows,
    states: States,
    *,
    last: bool = True,
    blocks: tuple[int, int] | None = None,
  ) -> tuple[Rows, States, Arrivals]:
    """Takes prompts, or a chunk of them, through the blocks.

    Args:
      rows: from `enter`; padding stands at the end of each prompt, so that
        later chunks may be all padding.
      states: of these blocks, as their caches made them, or from the chunk
        before.
      last: it is the last chunk (static); then states are those for `decode`.
      blocks: the first one, and the one behind the last; None: all.

    Returns:
      Rows behind the blocks, states, and what the last block was given.
    """
    carry, out = {}, []
    arrivals: Any = None
    first, stop = blocks or (0, len(self.blocks))
    for i, state in zip(range(first, stop), states, strict=True):
      block = self.blocks[i]
      rows, state, carry, arrivals = block.prefill(rows, state, carry, last)
      out.append(state)
    return rows, tuple(out), arrivals

  def decode(
    self,
    tokens: Int[Array, "b"],
    position: Int[Array, "b"],
    valid: Bool[Array, "b"],
    states: States,
  ) -> tuple[Float[Array, "b v"], States]:
    """Logits of the token after these, and the states with them.

    Args:
      tokens: the newest id of each example.
      position: their places in their texts.
      valid: False for examples that are complete: their states stay.
      states: of every block.
    """
    one = lambda x: x[:, None]
    rows, carry = self.enter(one(tokens), one(position), one(valid)), {}
    out = []
    for block, state in zip(self.blocks, states, strict=True):
      rows, state, carry = block.decode(rows, state, carry)
      out.append(state)
    return self.read(rows.x)[:, 0], tuple(out)

  def read(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
    """Logits of hidden states behind the last block."""
    return self.logits(self.norm(x))

  def logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
    """Logits of normed features, float32."""
    y = self.embed.attend(x) if self.config.tied else self.head(x)
    y = y.astype(jnp.float32)
    cap = self.config.logit_softcap
    return y if cap is None else cap * jnp.tanh(y / cap)


def attend_of(slots: Slots) -> Any:
  """What fills the slot `attend`; dense attention if nothing does."""
  return Causal() if slots.attend is None else slots.attend


def cache_of(slots: Slots) -> Any:
  """What fills the slot `cache`; the full cache if nothing does."""
  return KV() if slots.cache is None else slots.cache


def positions_of(valid: Bool[Array, "b n"]) -> Int[Array, "b n"]:
  """Places in the text; padding has that of the token before it."""
  return jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)


def layers_of(config: DecoderConfig, dtype: Any) -> tuple[Layer, ...]:
  """What the slots of each block are told."""
  return tuple(
    Layer(
      index=i,
      depth=config.depth,
      heads=config.heads,
      kv_heads=config.kv_heads,
      head_dim=config.features,
      rotary=config.rotary_of(i),
      scale=config.attention_scale,
      soft_cap=config.attention_softcap,
      window=config.window_of(i),
      dtype=dtype,
    )
    for i in range(config.depth)
  )
