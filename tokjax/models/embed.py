"""Images to tokens: patches, tokens in front, positions."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from tokjax.models.positions import resize_table
from tokjax.tokens import Kind, Tokens


class Embed(nn.Module):
  """The stem of a vision transformer.

  Attributes:
    config: a `ViTConfig`.
    dtype: of the features.
  """

  config: Any
  dtype: Any

  @nn.compact
  def __call__(self, images, mask):
    cfg = self.config
    self._check(images)
    b = images.shape[0]
    x = images.astype(self.dtype)
    stride = (cfg.patch_size, cfg.patch_size)
    if cfg.stem == "conv":
      for i in range(2):
        x = nn.Conv(cfg.width // 2, (3, 3), dtype=self.dtype, name=f"stem_{i}")(
          x
        )
        x = nn.relu(x)
    x = nn.Conv(
      cfg.width,
      stride,
      strides=stride,
      padding="VALID",
      use_bias=cfg.patch_bias,
      dtype=self.dtype,
      name="patch",
    )(x)
    grid = (x.shape[1], x.shape[2])
    x = x.reshape(b, -1, cfg.width)
    x = self._positions(self._front(x), grid)
    if cfg.pre_norm:
      x = nn.LayerNorm(epsilon=cfg.epsilon, dtype=self.dtype, name="pre_norm")(
        x
      )
    return self._tokens(x, grid, mask), grid

  def _check(self, images):
    cfg = self.config
    if images.ndim != 4 or images.shape[-1] != cfg.channels:
      raise ValueError(
        f"images of shape {images.shape}: must be"
        f" [batch, height, width, {cfg.channels}]"
      )
    _, height, width, _ = images.shape
    over = height % cfg.patch_size or width % cfg.patch_size
    if over and not cfg.drop_edge:
      raise ValueError(
        f"images of {height}x{width} pixels: both sides must be multiples of"
        f" patch_size={cfg.patch_size}"
      )

  def _front(self, x):
    """Puts class, distillation and register tokens before the patches."""
    cfg, front = self.config, []
    init = nn.initializers.normal(0.02)
    for name, count in (
      ("class_token", int(cfg.class_token)),
      ("distillation_token", int(cfg.distillation_token)),
      ("registers", cfg.registers),
    ):
      if count:
        token = self.param(name, init, (1, count, cfg.width))
        front.append(jnp.broadcast_to(token, (x.shape[0], count, cfg.width)))
    return jnp.concatenate([t.astype(x.dtype) for t in front] + [x], axis=1)

  def _positions(self, x, grid):
    """Adds the position table, interpolated if the grid is another one."""
    cfg = self.config
    front, lead = len(cfg.kinds), cfg.positions_in_front
    table = self.param(
      "position",
      nn.initializers.normal(0.02),
      (1, lead + cfg.num_patches, cfg.width),
    )
    head, body = table[:, :lead], table[:, lead:]
    body = resize_table(body, cfg.grid, grid, cfg.position_resize)
    bare = jnp.zeros((1, front - lead, cfg.width), table.dtype)
    return x + jnp.concatenate([head, bare, body], axis=1).astype(x.dtype)

  def _tokens(self, x, grid, mask):
    b, n, _ = x.shape
    front = len(self.config.kinds)
    rows, columns = jnp.meshgrid(
      jnp.arange(grid[0], dtype=jnp.float32),
      jnp.arange(grid[1], dtype=jnp.float32),
      indexing="ij",
    )
    position = jnp.stack([rows.ravel(), columns.ravel()], axis=-1)
    position = jnp.concatenate([jnp.zeros((front, 2)), position])
    kind = jnp.array(
      [*self.config.kinds] + [Kind.PATCH] * (n - front), jnp.int32
    )
    if mask is not None:
      if mask.shape != (b, n - front) or mask.dtype != bool:
        raise ValueError(
          f"mask of shape {mask.shape} and {mask.dtype}: must be"
          f" {(b, n - front)} and bool, one entry a patch"
        )
      mask = jnp.concatenate([jnp.ones((b, front), bool), mask], axis=1)
    return Tokens(
      x=x,
      size=jnp.ones((b, n), jnp.float32),
      position=jnp.broadcast_to(position, (b, n, 2)),
      kind=jnp.broadcast_to(kind, (b, n)),
      mask=mask,
    )
