"""A small decoder that language recipes are built into."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from tests.cache import cases
from tests.contract.case import draw_params
from tests.decoder.models import config
from tokjax import recipes
from tokjax.models import prefill
from tokjax.models.decoder import Decoder
from tokjax.models.decoder_config import DecoderConfig
from tokjax.slots import Slots
from tokjax.tokens import Kind

CAPACITY, STEPS = 24, 3
LENGTHS = (CAPACITY, 13, 5)
# Where prompts of recipes that reduce VISUAL tokens hold them: (start, tokens).
VISUAL = ((4, 12), (3, 8), (1, 3))


@dataclasses.dataclass(frozen=True)
class DecoderHost:
  """A decoder of grouped heads; prompts are ragged, some tokens follow.

  The head is not tied to the embeddings, so that an embedding can be NaN and
  logits are not.

  Attributes:
    name: of the host, in test ids.
    reduces: four blocks, for recipes that reduce tokens between them; False:
      two, for all others (each block costs compile time).
  """

  name: str
  families: ClassVar = ("llm", "cache", "vlm")
  reduces: bool = False

  @property
  def config(self) -> DecoderConfig:
    return config(depth=4 if self.reduces else 2, tied=False)

  def slots(self, recipe: str, keep: float) -> Slots:
    """The recipe with options that are small enough for these prompts.

    Of one that reduces in towers and in the language model, the latter part.
    """
    slots = recipes.get(recipe, keep=keep, **cases.options_of(recipe))
    return slots.outside_towers if slots.reduce else slots

  def build(self, slots: Slots, dtype: Any = jnp.float32, **changes) -> Decoder:
    return Decoder(dataclasses.replace(self.config, **changes), slots, dtype)

  def admits(self, slots: Slots, **changes) -> bool:
    """Whether the model can be built with these slots and take prompts."""
    if self.reduces != bool(slots.reduce):
      return False
    try:
      prefill.check(self.build(slots, **changes), CAPACITY, STEPS, None)
    except ValueError:
      return False
    return True

  def params(self, model: Decoder) -> dict[str, Any]:
    """Random parameters."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    return draw_params(shapes["params"])

  def inputs(self, batch: int) -> dict[str, jax.Array]:
    """Prompts padded with id 0, their lengths, kinds, and what follows."""
    rng = np.random.default_rng(7)
    # The last two ids are left for garbage.
    draw = lambda *shape: rng.integers(1, self.config.vocabulary - 2, shape)
    length = np.resize(LENGTHS, batch)
    place = np.arange(CAPACITY)
    real = place < length[:, None]
    start, tokens = np.resize(VISUAL, (batch, 2)).T[..., None]
    visual = (place >= start) & (place < start + tokens)
    return {
      "prompt": jnp.asarray(np.where(real, draw(batch, CAPACITY), 0), "int32"),
      "length": jnp.asarray(length, "int32"),
      "kind": jnp.asarray(np.where(visual, Kind.VISUAL, Kind.TEXT), "int32"),
      "text": jnp.asarray(draw(batch, STEPS), "int32"),
    }
