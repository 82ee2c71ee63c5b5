"""A small vision-language model whose rules are told what the encoder saw.

Each example is an image in crops with a question; results are the logits of the
next token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.cache.cases import QUICK
from tests.contract.case import BATCH, KEY
from tests.contract.vlm_runs import VisionLanguageCase, VisionLanguageHost
from tests.multimodal import vlm_models
from tests.multimodal.vlm_models import IMAGE
from tokjax import signals
from tokjax.models import vlm_seen
from tokjax.models.any_resolution import Crops
from tokjax.models.vlm import Prompts
from tokjax.slots import Slots

# Two crops behind the whole image.
SIZE, CROPS = (24, 12), 3


@dataclasses.dataclass(frozen=True)
class PromptHost(VisionLanguageHost):
  """A whole model, for recipes of its language model that ask about images."""

  @property
  def config(self):
    return vlm_models.config(pinpoints=(SIZE,))

  def admits(self, slots: Slots) -> bool:
    """Whether results show what the slots do: they ask about images."""
    return any(isinstance(q, signals.OF_IMAGES) for q in vlm_seen.asked(slots))

  def inputs(self, batch: int) -> jax.Array:
    """Random crops of an image each."""
    rng = np.random.default_rng(7)
    shape = (batch, CROPS, 12, 12, 3)
    return jnp.asarray(rng.normal(size=shape), "float32")

  def prompts(self, slots: Slots, batch: int) -> Prompts:
    """Questions about images, whose pixels are left to be filled in."""
    made = vlm_models.generator(slots, pinpoints=(SIZE,))
    made = dataclasses.replace(made, image_buckets=(CROPS * batch,))
    blank = Crops(np.zeros((CROPS, 12, 12, 3), np.float32), SIZE)
    return made.pack([[1, IMAGE, 7, 9]] * batch, [[blank]] * batch)[0]


class PromptCase(VisionLanguageCase):
  """Results: "output", logits behind the prompt."""

  exact = False

  @property
  def output_shape(self) -> tuple[int, ...]:
    return BATCH, self.host.config.language.vocabulary

  def program(self, slots: Slots):
    model, packed = self.host.build(slots), self.host.prompts(slots, BATCH)

    def forward(params, images, key):
      del key  # Recipes that draw are refused by decoders.
      prompts = dataclasses.replace(
        packed, images=images.reshape(-1, *images.shape[2:])
      )
      logits, _ = model.apply({"params": params}, prompts)
      return {"output": jax.vmap(lambda x, n: x[n - 1])(logits, prompts.length)}

    return jax.jit(forward, compiler_options=QUICK)

  @property
  def nan_inputs(self):
    return self.params, self.inputs.at[1, 1, 3, 3, 0].set(jnp.nan)

  def keeping_all(self) -> tuple[dict, dict]:
    slots = self.host.slots(self.recipe, 1.0)
    whole = self.program(slots)(self.params, self.inputs, KEY(0))
    return jax.device_get(whole), plain(self.host)


@functools.cache
def plain(host: PromptHost) -> dict:
  """Results of the model without a recipe."""
  case = PromptCase("none", host)
  return jax.device_get(case.program(Slots())(case.params, case.inputs, KEY(0)))
