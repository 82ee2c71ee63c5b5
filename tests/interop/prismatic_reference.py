"""OpenVLA in plain torch: its names and its arithmetic.

Written from prismatic/extern/hf/modeling_prismatic.py of openvla/openvla, whose
classes need versions of timm and transformers that do not go together with
those here. Towers are those of `timm_reference`, the decoder is that of
`transformers`.
"""

import numpy as np

from tests.interop.language_references import torch, transformers
from tests.interop.timm_reference import Mlp, Scale, VisionTransformer

nn = torch.nn


def quickly(x):
  return x * torch.sigmoid(1.702 * x)


class Featurizer(VisionTransformer):
  """Patches behind the last block but one, without the final norm."""

  def __init__(self, quick=False, epsilon=1e-6, **options):
    super().__init__(**options, num_classes=None, global_pool="")
    for module in self.modules():
      if isinstance(module, nn.LayerNorm):
        module.eps = epsilon
      if quick and isinstance(module, Mlp):
        module.forward = lambda x, own=module: own.fc2(quickly(own.fc1(x)))
    for module in list(self.modules()):
      if isinstance(module, Scale):
        # Names with gamma in them are changed by some versions.
        module.scale_factor = module.gamma
        del module.gamma
        module.forward = lambda x, own=module: x * own.scale_factor

  def forward(self, images):
    x = self.patch_embed.proj(images)
    x = x.flatten(2).transpose(1, 2)
    front = [t for t in (self.cls_token, self.reg_token) if t is not None]
    front = [t.expand(len(x), -1, -1) for t in front]
    if self.no_embed_class:
      x = torch.cat([*front, x + self.pos_embed], dim=1)
    else:
      x = torch.cat([*front, x], dim=1) + self.pos_embed
    x = self.norm_pre(x)
    for block in self.blocks[:-1]:
      x = block(x)
    return x[:, self.front :]


class Backbone(nn.Module):
  def __init__(self, first, second=None):
    super().__init__()
    self.featurizer = Featurizer(**first)
    self.fused_featurizer = Featurizer(**second) if second else None

  def forward(self, pixels):
    if self.fused_featurizer is None:
      return self.featurizer(pixels)
    a, b = pixels.split([3, 3], dim=1)
    return torch.cat([self.featurizer(a), self.fused_featurizer(b)], dim=2)


class Projector(nn.Module):
  def __init__(self, width, out, fused):
    super().__init__()
    hidden = 4 * width if fused else out
    self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, out)
    self.fc3 = nn.Linear(out, out) if fused else None

  def forward(self, x):
    x = self.fc2(nn.functional.gelu(self.fc1(x)))
    return x if self.fc3 is None else self.fc3(nn.functional.gelu(x))


class Prismatic(nn.Module):
  """Images stand behind the first token of a prompt."""

  def __init__(self, first, second, text):
    super().__init__()
    self.vision_backbone = Backbone(first, second)
    width = first["embed_dim"] + (second["embed_dim"] if second else 0)
    self.projector = Projector(width, text["hidden_size"], bool(second))
    config = transformers.LlamaConfig(**text)
    config._attn_implementation = "eager"
    self.language_model = transformers.LlamaForCausalLM(config)

  def forward(self, ids, pixels):
    x = self.language_model.get_input_embeddings()(ids)
    if pixels is not None:
      seen = self.projector(self.vision_backbone(pixels))
      x = torch.cat([x[:, :1], seen, x[:, 1:]], dim=1)
    return self.language_model(inputs_embeds=x).logits


def actions_of(ids, config, dataset):
  """Actions of tokens, one number after the other."""
  stats = config["norm_stats"][dataset]["action"]
  count = config["n_action_bins"]
  vocabulary = config["text_config"]["vocab_size"]
  vocabulary -= config["pad_to_multiple_of"]
  edges = [-1 + 2 * i / (count - 1) for i in range(count)]
  found = []
  for i, token in enumerate(ids):
    at = min(max(vocabulary - token - 1, 0), count - 2)
    value = (edges[at] + edges[at + 1]) / 2
    if stats.get("mask", [True] * len(ids))[i]:
      low, high = stats["q01"][i], stats["q99"][i]
      value = 0.5 * (value + 1) * (high - low) + low
    found.append(value)
  return np.array(found)
