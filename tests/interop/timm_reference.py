"""timm's VisionTransformer in plain torch: its names and its arithmetic.

Written from the published definition, for machines without timm (which needs
torchvision). Where timm can be imported, test_timm.py holds the two together.
"""

import pytest

torch = pytest.importorskip(
  "torch", reason="parity is measured where torch is installed"
)
nn = torch.nn


class Scale(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.gamma = nn.Parameter(torch.ones(width))

  def forward(self, x):
    return x * self.gamma


class Attention(nn.Module):
  def __init__(self, width, heads, qkv_bias):
    super().__init__()
    self.heads = heads
    self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
    self.proj = nn.Linear(width, width)

  def forward(self, x):
    b, n, d = x.shape
    q, k, v = self.qkv(x).chunk(3, dim=-1)
    q, k, v = (y.view(b, n, self.heads, -1).transpose(1, 2) for y in (q, k, v))
    logits = q @ k.transpose(-2, -1) / (d // self.heads) ** 0.5
    y = logits.softmax(dim=-1) @ v
    return self.proj(y.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
  def __init__(self, width, hidden):
    super().__init__()
    self.fc1 = nn.Linear(width, hidden)
    self.fc2 = nn.Linear(hidden, width)

  def forward(self, x):
    return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
  def __init__(self, width, heads, hidden, qkv_bias, scaled):
    super().__init__()
    self.norm1 = nn.LayerNorm(width, eps=1e-6)
    self.attn = Attention(width, heads, qkv_bias)
    self.ls1 = Scale(width) if scaled else nn.Identity()
    self.norm2 = nn.LayerNorm(width, eps=1e-6)
    self.mlp = Mlp(width, hidden)
    self.ls2 = Scale(width) if scaled else nn.Identity()

  def forward(self, x):
    x = x + self.ls1(self.attn(self.norm1(x)))
    return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
  def __init__(self, width, patch, bias):
    super().__init__()
    self.proj = nn.Conv2d(3, width, patch, patch, bias=bias)


class VisionTransformer(nn.Module):
  """timm's model; `distilled` gives it a second token and a second head."""

  def __init__(
    self,
    *,
    img_size,
    patch_size,
    embed_dim,
    depth,
    num_heads,
    mlp_ratio,
    num_classes,
    global_pool="token",
    qkv_bias=True,
    init_values=None,
    class_token=True,
    no_embed_class=False,
    reg_tokens=0,
    pre_norm=False,
    fc_norm=None,
    distilled=False,
  ):
    super().__init__()
    width = embed_dim
    sides = img_size if isinstance(img_size, tuple) else (img_size, img_size)
    self.grid = tuple(side // patch_size for side in sides)
    norm = lambda on: nn.LayerNorm(width, eps=1e-6) if on else nn.Identity()
    token = lambda n: nn.Parameter(torch.zeros(1, n, width)) if n else None
    pooled = global_pool == "avg" if fc_norm is None else fc_norm
    self.pool, self.no_embed_class = global_pool, no_embed_class
    self.cls_token = token(int(class_token))
    self.dist_token = token(int(distilled))
    self.reg_token = token(reg_tokens)
    self.front = class_token + distilled + reg_tokens
    lead = 0 if no_embed_class else self.front
    self.pos_embed = token(lead + self.grid[0] * self.grid[1])
    self.patch_embed = PatchEmbed(width, patch_size, not pre_norm)
    self.norm_pre = norm(pre_norm)
    hidden = int(width * mlp_ratio)
    self.blocks = nn.Sequential(
      *(
        Block(width, num_heads, hidden, qkv_bias, bool(init_values))
        for _ in range(depth)
      )
    )
    self.norm, self.fc_norm = norm(not pooled), norm(pooled)
    head = lambda: nn.Linear(width, num_classes) if num_classes else None
    self.head, self.head_dist = head(), head() if distilled else None

  def positions(self, grid):
    front = self.pos_embed.shape[1] - self.grid[0] * self.grid[1]
    table = self.pos_embed[:, front:].transpose(1, 2)
    table = table.reshape(1, -1, *self.grid)
    if grid != self.grid:
      table = nn.functional.interpolate(
        table, grid, mode="bicubic", antialias=True
      )
    table = table.flatten(2).transpose(1, 2)
    return torch.cat([self.pos_embed[:, :front], table], dim=1)

  def forward(self, images):
    x = self.patch_embed.proj(images)
    positions = self.positions(tuple(x.shape[2:]))
    x = x.flatten(2).transpose(1, 2)
    front = [
      t.expand(len(x), -1, -1)
      for t in (self.cls_token, self.dist_token, self.reg_token)
      if t is not None
    ]
    if self.no_embed_class:
      x = torch.cat([*front, x + positions], dim=1)
    else:
      x = torch.cat([*front, x], dim=1) + positions
    x = self.norm(self.blocks(self.norm_pre(x)))
    if self.head_dist is not None:
      return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
    pooled = x[:, 0] if self.pool == "token" else x[:, self.front :].mean(dim=1)
    pooled = self.fc_norm(pooled)
    return pooled if self.head is None else self.head(pooled)
