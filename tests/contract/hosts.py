"""Small models that recipes are built into, to be held to the laws.

A recipe runs in every host that can be built with its slots. A new kind of
model (a decoder, a video model) joins by one more entry in `HOSTS`; a recipe
that no host takes fails the contract.
"""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import recipes
from tokjax.models import ViT, ViTConfig
from tokjax.models.encoder import Encoder
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens

DECODERS = ("llm", "cache", "vlm")


def names() -> tuple[str, ...]:
  """Recipes that models of this module take: all but those of decoders."""
  return tuple(
    name
    for name in recipes.names()
    if recipes.find(name).family not in DECODERS
  )


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

  @property
  def protected(self) -> int:
    return len(self.config.kinds)

  def build(self, slots: Slots, dtype: Any = jnp.float32, **changes) -> ViT:
    return ViT(dataclasses.replace(self.config, **changes), slots, dtype)

  def admits(self, slots: Slots, **changes) -> bool:
    """Whether the model can be built with these slots."""
    try:
      self.build(slots, **changes)
    except ValueError:
      return False
    return True

  def images(self, batch: int) -> jax.Array:
    """Random, so that no two tokens and no two scores tie."""
    side = self.config.image_size
    rng = np.random.default_rng(7)
    return jnp.asarray(rng.normal(size=(batch, side, side, 3)), "float32")

  def params(self, model: ViT) -> dict[str, Any]:
    """Random parameters, drawn without compiling an initialiser.

    Larger than at the start of training, so that attention is not uniform.
    """
    side = model.config.image_size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    key = jax.random.key(0)

    def init(image):
      return model.init(key, image, key=key)["params"]

    def draw(path, leaf):
      name = jax.tree_util.keystr(path)
      rng = np.random.default_rng(zlib.crc32(name.encode()))
      noise = rng.normal(size=leaf.shape).astype(np.float32)
      if "scale" in name:
        return jnp.asarray(1 + 0.1 * noise)
      fan = np.prod(leaf.shape[:-1]) if "kernel" in name else 4.0
      return jnp.asarray(1.5 * noise / np.sqrt(fan, dtype=np.float32))

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init, image))

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


HOSTS = (
  VisionHost(
    "vit", dataclasses.replace(SMALL, distillation_token=True, registers=1)
  ),
  VisionHost(
    "vit_mean", dataclasses.replace(SMALL, class_token=False, pool="mean")
  ),
)

KEEP = 0.5


@functools.cache
def hosts_of(name: str, keep: float = KEEP) -> tuple[VisionHost, ...]:
  """The hosts that take a recipe."""
  slots = recipes.get(name, keep=keep)
  return tuple(host for host in HOSTS if host.admits(slots))
