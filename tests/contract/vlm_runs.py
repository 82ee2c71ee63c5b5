"""Towers of a small vision-language model that recipes are built into.

What is held to the laws is what towers hand to the language model: the visual
tokens of each image. Prompts around them are ragged in
`tests/multimodal/test_vlm.py`.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from tests.cache.cases import QUICK
from tests.contract.case import BATCH, KEY, Case
from tests.multimodal import vlm_models
from tokjax import recipes
from tokjax.models import VisionLanguage
from tokjax.models.vlm import tokens_per_image
from tokjax.slots import Slots

# Options that suit an encoder of three blocks.
OPTIONS = {"vtc_cls": {"blocks": 2}}


@dataclasses.dataclass(frozen=True)
class VisionLanguageHost:
  """Towers before a language model, for recipes that fill one of them.

  Attributes:
    name: of the host, in test ids.
  """

  name: str
  families: ClassVar = ("vlm",)

  @property
  def config(self):
    return vlm_models.config()

  def slots(self, recipe: str, keep: float) -> Slots:
    return recipes.get(recipe, keep=keep, **OPTIONS.get(recipe, {}))

  def build(
    self, slots: Slots, dtype: Any = jnp.float32, **changes
  ) -> VisionLanguage:
    config = dataclasses.replace(self.config, **changes)
    return VisionLanguage(config, slots, dtype)

  def admits(self, slots: Slots) -> bool:
    """Whether results show what the slots do: they fill a tower.

    A model that refuses it then fails every law. Models are not built here:
    that traces their towers, for every recipe, in each process that collects
    tests.
    """
    return bool(slots.towers)

  def params(self, model: VisionLanguage) -> dict[str, Any]:
    """Random parameters."""
    return vlm_models.params_of(model.config)

  def inputs(self, batch: int) -> jax.Array:
    """Random images."""
    rng = np.random.default_rng(7)
    return jnp.asarray(rng.normal(size=(batch, 12, 12, 3)), "float32")


class VisionLanguageCase(Case):
  """Results: "output", visual tokens, zeros where they are padding."""

  @property
  def output_shape(self) -> tuple[int, ...]:
    config = self.host.config
    count = tokens_per_image(config, self.slots)
    return BATCH, count, config.language.width

  @property
  def takes_mask(self) -> bool:
    return False

  def program(self, slots: Slots):
    model = self.host.build(slots)

    def see(params, images, key):
      tokens, _ = model.apply({"params": params}, images, key, method="see")
      x = tokens.x
      if tokens.mask is not None:
        x = jnp.where(tokens.mask[..., None], x, 0.0)
      return {"output": x}

    return jax.jit(see, compiler_options=QUICK)

  @functools.cached_property
  def batch(self):
    return self.program(self.slots)

  @property
  def other_inputs(self):
    return self.inputs[::-1]

  @property
  def nan_inputs(self):
    return self.params, self.inputs.at[1, 3, 3, 0].set(jnp.nan)

  def padded_and_alone(self):
    raise NotImplementedError("images are not padded")

  def with_garbage(self):
    raise NotImplementedError("images are not padded")

  def keeping_all(self) -> tuple[dict, dict]:
    slots = self.host.slots(self.recipe, 1.0)
    whole = self.program(slots)(self.params, self.inputs, KEY(0))
    patches = self.host.config.vision.num_patches
    # Where the class token goes on, it stands in front.
    return {"output": whole["output"][:, -patches:]}, plain(self.host)


@functools.cache
def plain(host: VisionLanguageHost) -> dict:
  """Results of the towers without a recipe."""
  case = VisionLanguageCase("none", host)
  return jax.device_get(case.program(Slots())(case.params, case.inputs, KEY(0)))
