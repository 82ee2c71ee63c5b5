"""Decoder-only language models: Llama, Mistral, Qwen and Gemma.

One pre-norm transformer with the slots `reduce`, `attend` and `cache`; families
differ by configuration only. A whole sequence is a plain call,

    logits, out = model.apply({"params": params}, tokens, mask=mask)

and text is made over states of the cache, block by block: see
`tokjax.models.decoder_programs` and `tokjax.models.generation`.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tokjax.attention.padding import RealFirst
from tokjax.layer import LOSSES, Layer
from tokjax.learned.latent_draft import Drafted
from tokjax.models.decoder_block import Block, Rows, positions_of
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.decoder_layers import norm
from tokjax.models.decoder_slots import (
  capacities_of,
  check_initialised,
  check_mask,
  check_slots,
  kind_of_weights,
  put_back,
  stages_of,
  start_passage,
  whole_sequence,
)
from tokjax.models.products import dot_general
from tokjax.models.reducer import Reducer
from tokjax.models.rotary import Rotary
from tokjax.signals import Answers
from tokjax.slots import Slots
from tokjax.tokens import Kind

States = tuple[Any, ...]
exact = functools.partial(dot_general, preferred_element_type=jnp.float32)


class DraftedLogits(NamedTuple):
  """What the draft says of whole texts, for its loss.

  Attributes:
    rows: features, see `tokjax.learned.latent_draft.Drafted`.
    logits, target: of these, guessed and true, `[b, t, k, v]`.
  """

  rows: Drafted
  logits: Float[Array, "b t k v"]
  target: Float[Array, "b t k v"]


class Decoder(nn.Module):
  """A language model built with slots.

  Attributes:
    config: the architecture.
    slots: what a recipe returned; `Slots()` is the plain model.
    dtype: of activations and caches; parameters stay float32.
    images: part of a vision-language model, which answers what rules ask about
      images.
  """

  config: DecoderConfig
  slots: Slots = Slots()
  dtype: Any = jnp.float32
  images: bool = False

  def __post_init__(self):
    super().__post_init__()
    check_slots(self.config, self.slots, self.images)

  def setup(self):
    cfg = self.config
    self.embed = nn.Embed(cfg.vocabulary, cfg.width, dtype=self.dtype)
    self.blocks = [
      Block(cfg, self.slots, layer, self.dtype, name=f"block_{i}")
      for i, layer in enumerate(self.layers)
    ]
    self.norm = norm(cfg, self.dtype)
    if self.slots.draft is not None:
      self.draft = self.slots.draft.clone(
        width=cfg.width, heads=cfg.heads, rotary=Rotary(), parent=None
      )
    if not cfg.tied:
      self.head = nn.Dense(
        cfg.vocabulary, use_bias=False, dtype=self.dtype, dot_general=exact
      )

  @property
  def layers(self) -> tuple[Layer, ...]:
    """What the slots are told of each block."""
    return layers_of(self.config, self.dtype)

  def __call__(
    self,
    tokens: Int[Array, "b n"],
    *,
    mask: Bool[Array, "b n"] | None = None,
    kind: Int[Array, "b n"] | None = None,
    inputs: Float[Array, "b n d"] | None = None,
    coordinates: Int[Array, "b n a"] | None = None,
    known: Answers | None = None,
    key: PRNGKeyArray | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, "b n v"], dict[str, Any]]:
    """Logits of the token after each one.

    Where a recipe reduces tokens, those that remain at the end are put back at
    their places; the logits of the others are zero.

    Args:
      tokens: ids.
      mask: False for padding, wherever it is; None: all are real. What comes
        out at padding has no meaning.
      kind: of each token, one of `Kind`; None: all are TEXT.
      inputs: embeddings of the tokens that are not TEXT; see `enter`.
      coordinates: positions on each axis; see `enter`.
      known: see `Rows`.
      key: for recipes that are random.
      train: recipes that train with soft masks use that form.

    Returns:
      logits, float32, and `out`: "features" (normed, `[b, n, d]`), "remains"
      (True for tokens that went through all blocks, `[b, n]`), "plans" (a list
      for each block), "signals" (for each block, the answers that the recipe
      collects), "losses" (by name, what the attention of each layer learns
      from), "draft" (in training, `DraftedLogits` where there is a draft).
    """
    check_mask(mask, tokens)
    if kind is None and self.is_initializing():
      kind = kind_of_weights(self.slots, tokens)
    valid, order = jnp.ones(tokens.shape, bool), None
    if mask is not None:
      # Attention counts by place, with padding behind the real tokens.
      order = RealFirst.of(mask)
      tokens, valid = order.apply(tokens), order.apply(mask)
      kind = None if kind is None else order.apply(kind)
      inputs = None if inputs is None else order.apply(inputs)
      if coordinates is not None:
        coordinates = order.apply(coordinates)
      known = jax.tree.map(order.apply, known)
    rows = self.enter(
      tokens, positions_of(valid), valid, kind, inputs, coordinates
    )
    rows = rows._replace(known=Answers() if known is None else known)
    slots = whole_sequence(self.slots, self.is_initializing())
    stages = stages_of(slots, self.config, tokens.shape[1], capacities_of(rows))
    if self.is_initializing():
      check_initialised(slots, stages)
    reducer = Reducer.create(
      slots, stages, len(tokens), masked=mask is not None, ragged=True,
      key=key, train=train,
    )  # fmt: skip
    passage, carry, collected = start_passage(reducer, rows), {}, []
    for i, block in enumerate(self.blocks):
      passage = passage.replace(plans=(*passage.plans, ()))
      passage, carry, answers = block.forward(passage, carry, reducer)
      collected.append(answers)
      passage = reducer.give_back(passage, i)
    x, remains = put_back(passage, valid)
    x = self.norm(x)
    drafted = None
    if self.slots.draft is not None and (train or self.is_initializing()):
      drafted = self._drafted(x, rows, remains & valid, key)
    if order is not None:
      x, remains = order.undo(x), order.undo(remains)
    out = {
      "features": x,
      "remains": remains,
      "plans": [list(made) for made in passage.plans],
      "signals": collected if self.slots.collect else [],
      "losses": carry.get(LOSSES, {}),
      "draft": drafted,
    }
    return self.logits(x), out

  def _drafted(self, x, rows: Rows, real, key) -> DraftedLogits:
    """What the draft says of normed features; they learn nothing from it."""
    fixed = jax.lax.stop_gradient
    kind = rows.kind
    kind = jnp.full(real.shape, Kind.TEXT, jnp.int32) if kind is None else kind
    said = self.draft(fixed(x), fixed(rows.x), kind, real, key)
    return DraftedLogits(
      said, self.logits(said.features), fixed(self.logits(said.target))
    )

  def enter(
    self,
    token: Int[Array, "b t"],
    position: Int[Array, "b t"],
    valid: Bool[Array, "b t"],
    kind: Int[Array, "b t"] | None = None,
    inputs: Float[Array, "b t d"] | None = None,
    coordinates: Int[Array, "b t a"] | None = None,
  ) -> Rows:
    """Embeds tokens; for those who call the blocks themselves.

    With `inputs`, tokens that are not TEXT have these embeddings, as they are;
    their ids are not looked up. `position` orders tokens; `coordinates` are
    what they are rotated to where positions have several axes, None: the same
    on each.
    """
    x = self.embed(token)
    if self.config.embed_scale:
      x = x * jnp.asarray(self.config.width**0.5, x.dtype)
    if inputs is not None:
      if kind is None:
        raise ValueError("inputs: needs kind=, which says whose they are")
      text = (kind == Kind.TEXT)[..., None]
      x = jnp.where(text, x, inputs.astype(x.dtype))
    if coordinates is None:
      return Rows(x, token, position, valid, kind)
    if self.config.axes != coordinates.shape[-1] or self.config.axes == 1:
      raise ValueError(
        f"coordinates: has {coordinates.shape[-1]} axes; positions of this"
        f" model have {self.config.axes}"
      )
    offset = coordinates - position[..., None]
    return Rows(x, token, position, valid, kind, offset)

  def read(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
    """Logits of hidden states behind the last block."""
    return self.logits(self.norm(x))

  def logits(self, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
    """Logits of normed features, float32: products are not rounded to less."""
    if self.config.tied:
      table = self.embed.embedding.astype(self.dtype)
      y = exact(x, table, (((x.ndim - 1,), (1,)), ((), ())))
    else:
      y = self.head(x)
    y = y.astype(jnp.float32)
    cap = self.config.logit_softcap
    return y if cap is None else cap * jnp.tanh(y / cap)


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
