"""Small models that recipes are built into, to be held to the laws.

A recipe runs in every host that can be built with its slots. A new kind of
model (vision-language, a denoiser) joins by one more entry in `HOSTS`, and a
`tests.contract.case.Case` that feeds it; a recipe that no host takes fails the
contract.
"""

import dataclasses
import functools
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.contract.case import KEEP, draw_params
from tests.contract.decoder_host import DecoderHost
from tests.contract.vlm_prompt_runs import PromptHost
from tests.contract.vlm_runs import VisionLanguageHost
from tokjax import recipes
from tokjax.models import ViT, ViTConfig
from tokjax.models.encoder import Encoder
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens


@runtime_checkable
class Host(Protocol):
  """A small model of one kind."""

  @property
  def name(self) -> str:
    """Of the host, in test ids."""
    ...

  @property
  def families(self) -> tuple[str, ...]:
    """Families of the recipes that are built into it."""
    ...

  def slots(self, recipe: str, keep: float) -> Slots:
    """The recipe, with options that suit the size of the model."""
    ...

  def build(self, slots: Slots, dtype: Any = ..., **changes) -> nn.Module:
    """The model with these slots; `changes` are of its config."""
    ...

  def admits(self, slots: Slots, **changes) -> bool:
    """Whether the model can be built with these slots."""
    ...

  def params(self, model: Any) -> dict[str, Any]:
    """Random parameters, such that no two tokens and no two scores tie."""
    ...

  def inputs(self, batch: int) -> Any:
    """A random batch; its leaves have the batch as leading axis."""
    ...


SMALL = ViTConfig(
  image_size=16,
  patch_size=2,
  channels=3,
  width=32,
  depth=3,
  heads=2,
  mlp_dim=64,
  num_classes=5,
)


@dataclasses.dataclass(frozen=True)
class VisionHost:
  """A vision transformer of 64 patches.

  Attributes:
    name: of the host, in test ids.
    config: its architecture.
  """

  name: str
  config: ViTConfig
  families: ClassVar = tuple(
    f for f in recipes.registry.FAMILIES if f not in DecoderHost.families
  )

  @property
  def protected(self) -> int:
    return len(self.config.kinds)

  def slots(self, recipe: str, keep: float) -> Slots:
    return recipes.get(recipe, keep=keep)

  def build(self, slots: Slots, dtype: Any = jnp.float32, **changes) -> ViT:
    return ViT(dataclasses.replace(self.config, **changes), slots, dtype)

  def admits(self, slots: Slots, **changes) -> bool:
    """Whether the model can be built with these slots."""
    try:
      self.build(slots, **changes)
    except ValueError:
      return False
    return True

  def inputs(self, batch: int) -> jax.Array:
    return self.images(batch)

  def images(self, batch: int) -> jax.Array:
    """Random, so that no two tokens and no two scores tie."""
    side = self.config.image_size
    rng = np.random.default_rng(7)
    return jnp.asarray(rng.normal(size=(batch, side, side, 3)), "float32")

  def params(self, model: ViT) -> dict[str, Any]:
    """Random parameters."""
    side = model.config.image_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    key = jax.random.key(0)
    init = lambda image: model.init(key, image, key=key)["params"]
    return draw_params(jax.eval_shape(init, image))

  def encoder(self, slots: Slots, dtype: Any = jnp.float32) -> Encoder:
    """The encoder alone; its parameters are `params["encoder"]`."""
    return Encoder(self.config, slots, dtype)

  def tokens(self, batch: int, patches: int, seed: int = 3) -> Tokens:
    """Random tokens as they enter the encoder, the protected ones first."""
    p, n = self.protected, self.protected + patches
    rng = np.random.default_rng(seed)
    columns = self.config.grid[1]
    index = np.arange(patches)
    grid = np.stack([index // columns, index % columns], axis=-1)
    position = np.concatenate([np.zeros((p, 2)), grid]).astype(np.float32)
    kind = np.array([*self.config.kinds] + [Kind.PATCH] * patches, np.int32)
    return Tokens(
      x=jnp.asarray(rng.normal(size=(batch, n, self.config.width)), "float32"),
      size=jnp.ones((batch, n), jnp.float32),
      position=jnp.broadcast_to(position, (batch, n, 2)),
      kind=jnp.broadcast_to(kind, (batch, n)),
    )


VISION = (
  VisionHost(
    "vit", dataclasses.replace(SMALL, distillation_token=True, registers=1)
  ),
  # Two blocks: what more of them add is seen in the first host.
  VisionHost(
    "vit_mean",
    dataclasses.replace(SMALL, class_token=False, pool="mean", depth=2),
  ),
)
HOSTS: tuple[VisionHost | DecoderHost | VisionLanguageHost, ...] = (
  *VISION,
  DecoderHost("decoder"),
  DecoderHost("deep_decoder", reduces=True),
  VisionLanguageHost("vlm"),
  PromptHost("vlm_prompts"),
)


@functools.cache
def hosts_of(name: str, keep: float = KEEP) -> tuple[Any, ...]:
  """The hosts that take a recipe."""
  family = recipes.find(name).family
  return tuple(
    host
    for host in HOSTS
    if family in host.families and host.admits(host.slots(name, keep))
  )


def taking(name: str, kind: type) -> list[Any]:
  """The hosts of one kind that take a recipe, the smallest one last."""
  return [host for host in hosts_of(name) if isinstance(host, kind)]


def names(kind: type = VisionHost) -> tuple[str, ...]:
  """Recipes that a host of this kind takes."""
  return tuple(
    name
    for name in recipes.names()
    if any(isinstance(host, kind) for host in hosts_of(name))
  )
