"""Answers to questions about images, by a vision-language model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.data.words import IMAGE
from experiments.tasks.language import Language
from experiments.tasks.task import Batch
from tokjax.models.vlm import Prompts, tokens_per_image
from tokjax.tokens import Kind


@dataclasses.dataclass(frozen=True)
class Questions(Language):
  """Cross entropy of the words that answer questions about one image.

  A batch holds "image" `[b, height, width, c]`, "tokens" and "target"
  `[b, n]`, and "length" `[b]`; one of the tokens of each row is the placeholder
  of its image. Recipes may leave fewer visual tokens: the placeholder becomes
  as many as the model with its slots has.
  """

  unit = "images"

  def units(self, data: Any) -> int:
    """How many images an example is, for the throughput."""
    del data
    return 1

  def inputs(self, batch: Batch, model: Any) -> Prompts:
    """Prompts in which every placeholder is the visual tokens of its image."""
    count = tokens_per_image(model.config, model.slots)
    tokens = jnp.asarray(batch["tokens"])
    rows, length = tokens.shape
    holder = _holder(tokens)
    place = jnp.arange(length - 1 + count)[None] - holder
    visual = (place >= 0) & (place < count)
    behind = jnp.where(place >= count, place - count + 1, jnp.minimum(place, 0))
    first = jnp.arange(rows)[:, None] * count
    return Prompts(
      jnp.take_along_axis(tokens, holder + behind, axis=1),
      jnp.where(visual, int(Kind.VISUAL), int(Kind.TEXT)),
      jnp.where(visual, first + place, 0),
      jnp.asarray(batch["length"]) - 1 + count,
      jnp.asarray(batch["image"]),
    )

  def answers(self, logits: jax.Array, batch: Batch) -> jax.Array:
    """Logits behind each token of the batch, `[b, n, vocabulary]`.

    Those of a placeholder are behind the last token of its image.
    """
    tokens = jnp.asarray(batch["tokens"])
    more = logits.shape[1] - tokens.shape[1]
    place = jnp.arange(tokens.shape[1])[None]
    place = place + jnp.where(place >= _holder(tokens), more, 0)
    return jnp.take_along_axis(logits, place[..., None], axis=1)


def _holder(tokens: jax.Array) -> jax.Array:
  """Place of the placeholder in each row, `[b, 1]`."""
  return (tokens == IMAGE).argmax(axis=1)[:, None]
