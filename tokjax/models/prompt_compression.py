"""A prompt as a few keys and values, made by an encoder without MLPs (AOC).

The encoder has the blocks of a language model, initialised with its weights,
without their MLPs. It reads a prompt and, behind it, learned embeddings of
memory; what its layers have as keys and values there is all that the frozen
model is given of the prompt. It learns to let the model repeat the prompt.

Honig et al., 2025 (arXiv 2501.06730); checked against
ehonig/Prompt-Compression-AFM-Workshop: models.py (c891aaa), whose steps were
run with `transformers` on the same weights. Deviation: prompts of a batch may
have different lengths; there, padding is part of them.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax.attention import core
from tokjax.models.decoder import Decoder
from tokjax.models.decoder_config import DecoderConfig
from tokjax.models.decoder_layers import Projections, norm

# Of each layer, of the places of memory.
Memories = tuple[tuple[Float[Array, "b m g k"], Float[Array, "b m g k"]], ...]


class AttentionBlock(nn.Module):
  """A block whose MLP is the identity; its norm and its residual are not.

  Attributes:
    config: of the language model.
  """

  config: DecoderConfig

  def setup(self):
    self.norm1 = norm(self.config, jnp.float32)
    self.norm2 = norm(self.config, jnp.float32)
    self.attention = Projections(self.config, jnp.float32)

  def __call__(self, layer, x, position, seen):
    """Hidden states behind it; keys, rotated, and values."""
    q, k, v = self.attention(self.norm1(x))
    q, k = layer.rotate(q, position), layer.rotate(k, position)
    x = x + self.attention.output(core.attended(layer, q, k, v, seen))
    return x + self.norm2(x), k, v


class PromptCompressor(nn.Module):
  """Encoder, memory and the language model that reads it.

  Attributes:
    config: of the language model; no sliding layers, no norms behind blocks.
    memory: places of memory.
  """

  config: DecoderConfig
  memory: int = 16

  def __post_init__(self):
    if self.memory < 1:
      raise ValueError(f"memory={self.memory}: must be 1 or more")
    windows = any(
      self.config.window_of(i) for i in range(self.config.depth)
    )
    if windows or self.config.post_norms:
      raise ValueError(
        f"config={self.config}: has sliding layers or norms behind its blocks,"
        " which the encoder does not; use a model without them"
      )
    super().__post_init__()

  def setup(self):
    self.decoder = Decoder(self.config)
    self.encoder = [
      AttentionBlock(self.config, name=f"encoder_{i}")
      for i in range(self.config.depth)
    ]
    shape = (self.memory, self.config.width)
    self.places = self.param("memory", nn.initializers.normal(1.0), shape)

  def __call__(
    self,
    prompt: Int[Array, "b n"],
    length: Int[Array, "b"],
    text: Int[Array, "b t"],
  ) -> Float[Array, "b t v"]:
    """Logits behind each token of a text that follows a compressed prompt."""
    return self.decode(self.encode(prompt, length), text)

  def encode(
    self, prompt: Int[Array, "b n"], length: Int[Array, "b"]
  ) -> Memories:
    """Keys, at the places behind a prompt, and values for each layer.

    Args:
      prompt: ids, padding behind them.
      length: of each prompt.
    """
    b, n = prompt.shape
    place = jnp.broadcast_to(jnp.arange(n)[None], (b, n))
    real = place < length[:, None]
    x = self.decoder.enter(jnp.where(real, prompt, 0), place, real).x
    memory = jnp.broadcast_to(self.places[None], (b, *self.places.shape))
    x = jnp.concatenate([x, memory.astype(x.dtype)], axis=1)
    behind = length[:, None] + jnp.arange(self.memory)[None]
    position = jnp.concatenate([place, behind], axis=1)
    there = jnp.concatenate([real, behind >= 0], axis=1)
    seen = core.visible(self.decoder.layers[0], position, position, there)
    made = []
    for layer, block in zip(self.decoder.layers, self.encoder, strict=True):
      x, k, v = block(layer, x, position, seen)
      made.append((k[:, n:], v[:, n:]))
    return tuple(made)

  def decode(
    self, memories: Memories, text: Int[Array, "b t"]
  ) -> Float[Array, "b t v"]:
    """Logits; the text begins at the position behind as many as memory has."""
    b, t = text.shape
    m = self.memory
    position = jnp.broadcast_to(m + jnp.arange(t)[None], (b, t))
    x = self.decoder.enter(text, position, position > 0).x
    before = jnp.arange(m + t)[None] <= m + jnp.arange(t)[:, None]
    seen = jnp.broadcast_to(before[None], (b, t, m + t))
    for layer, block, (keys, values) in zip(
      self.decoder.layers, self.decoder.blocks, memories, strict=True
    ):
      q, k, v = block.attention(block.norm1(x))
      q, k = layer.rotate(q, position), layer.rotate(k, position)
      k, v = (jnp.concatenate(x, axis=1) for x in ((keys, k), (values, v)))
      x = x + block.attention.output(core.attended(layer, q, k, v, seen))
      x = x + block.mlp(block.norm2(x))
    return self.decoder.read(x)


def from_decoder(
  params: dict[str, Any], decoder: dict[str, Any]
) -> dict[str, Any]:
  """Parameters of a `PromptCompressor` that starts from a language model.

  Args:
    params: drawn ones, whose memory stays.
    decoder: of the language model.
  """
  encoder = {
    f"encoder_{name.removeprefix('block_')}": {
      part: block[part] for part in ("norm1", "norm2", "attention")
    }
    for name, block in decoder.items()
    if name.startswith("block_")
  }
  return {"memory": params["memory"], "decoder": decoder, **encoder}


@dataclasses.dataclass(frozen=True)
class Repetition:
  """The task of the encoder: a model repeats the prompt, then ends.

  Attributes:
    begin, end: ids of the tokens that begin and end a text.
  """

  begin: int
  end: int

  def __call__(
    self, model: Any, params: Any,
    prompt: Int[Array, "b n"], length: Int[Array, "b"],
  ) -> tuple[Float[Array, ""], Float[Array, ""]]:  # fmt: skip
    """Cross entropy, and the share of tokens that are right.

    Args:
      model: a `PromptCompressor`.
      params: its parameters.
      prompt: ids, padding behind them.
      length: of each prompt.
    """
    b, n = prompt.shape
    begin = jnp.full((b, 1), self.begin, prompt.dtype)
    logits = model.apply(
      {"params": params}, prompt, length, jnp.concatenate([begin, prompt], 1)
    )
    at = jnp.arange(n + 1)[None]
    target = jnp.pad(prompt, [(0, 0), (0, 1)])
    target = jnp.where(at == length[:, None], self.end, target)
    asked = at <= length[:, None]
    each = -jnp.take_along_axis(
      jax.nn.log_softmax(logits), target[..., None], axis=-1
    )[..., 0]
    mean = lambda x: jnp.where(asked, x, 0).sum() / asked.sum()
    return mean(each), mean(logits.argmax(axis=-1) == target)
