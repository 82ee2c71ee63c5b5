"""Which patches of an image remain in a vision-language model, stage by stage.

`look` runs a model over prompts with one image each and composes the plans of
all towers with those of the language model.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokjax.analysis import merge_map, quick
from tokjax.attention.padding import RealFirst
from tokjax.models import VisionLanguage
from tokjax.models.vlm import Prompts, VisionLanguageConfig, passes_class
from tokjax.signals import Last, Rows
from tokjax.slots import Slots
from tokjax.tokens import Kind

# What FastV asks of a block, of every block.
LAST = Rows(of=Last(), over="mean", layer=0)


@dataclasses.dataclass(frozen=True)
class Stage:
  """What a stage left of the patches.

  Attributes:
    name: where it is: a tower or the language model, and the block from 1.
    share: how much of a patch each token takes over, `[b, m, patches]`.
  """

  name: str
  share: np.ndarray

  @property
  def remains(self) -> np.ndarray:
    """Which patches are part of a token, `[b, patches]`."""
    return self.share.sum(axis=1) > 1e-6

  def groups(self, grid: tuple[int, int]) -> merge_map.Groups:
    """For pictures."""
    used = (self.share > 1e-6).any(axis=2).sum(axis=1)
    index = np.where(self.remains, self.share.argmax(axis=1), -1)
    return merge_map.Groups(index.reshape(-1, *grid), self.share, used)


def look(
  model: VisionLanguage, params: Any, prompts: Prompts, key: Any
) -> list[Stage]:
  """What is left of the patches after each stage that reduces tokens.

  Args:
    model: built with the slots of a recipe; images are seen once.
    params: its parameters.
    prompts: with one image each, in order.
    key: for random recipes.
  """

  @quick.jit
  def run(params, prompts, key):
    (tokens, _), towers = model.apply(
      {"params": params}, prompts.images, key, method="see",
      mutable=["intermediates"],
    )  # fmt: skip
    out = model.apply({"params": params}, prompts, key=key)[1]
    found = {
      name: merge_map.provenance(own["plans"][0])
      for name, own in towers.get("intermediates", {}).items()
      if "plans" in own
    }
    found["vision"] = merge_map.provenance(out["vision"]["plans"])
    of = lambda plan: None if plan is None else merge_map.shares(plan)
    shares = {name: [of(plan) for plan in own] for name, own in found.items()}
    language = [[of(plan) for plan in made] for made in out["plans"]]
    return tokens.mask, shares, language

  mask, towers, language = jax.device_get(run(params, prompts, key))
  images = prompts.images.shape[0]
  stages, share = _of_towers(model, towers, images)
  rows = _in_prompts(prompts, share, mask)
  return stages + _of_language(language, rows)


def _of_towers(model: VisionLanguage, towers: Any, batch: int):
  """Stages before the language model, and what its visual tokens hold."""
  cfg = model.config.vision
  front, count = len(cfg.kinds), cfg.num_patches
  share = np.eye(front + count)[None, :, front:].repeat(batch, axis=0)
  stages: list[Stage] = []
  for name in ("vision", "ahead", "projector"):
    start, before = share, None
    for i, own in enumerate(towers.get(name, ())):
      # Provenance is that of the tower's input; None: nothing was reduced yet.
      if own is None or (before is not None and np.array_equal(own, before)):
        continue
      before, share = own, own @ start
      where = f"vision, block {i + 1}" if name == "vision" else name
      stages.append(Stage(where, share))
    if before is not None and _comes_back(model.slots, name):
      # Tokens go on as copies of the one that holds them.
      share = before.swapaxes(1, 2) @ share
    if name == "ahead" and not passes_class(model.config, model.slots):
      share = share[:, front:]
  return stages, share


def _comes_back(slots: Slots, tower: str) -> bool:
  """Whether tokens of a tower are given back behind its last block."""
  reduces = dict(slots.towers).get(tower, Slots()).reduce
  return any(r.back is not None and r.back.until == "end" for r in reduces)


def _in_prompts(
  prompts: Prompts, share: np.ndarray, mask: np.ndarray | None
) -> np.ndarray:
  """What each token of a prompt holds as it enters the language model.

  Tokens are in the order of the language model, padding at the end.
  """
  kind, place = np.asarray(prompts.kind), np.asarray(prompts.place)
  visual = (kind == Kind.VISUAL) & np.asarray(prompts.valid)
  real = np.asarray(prompts.valid)
  if mask is not None:
    visual &= mask.reshape(-1)[place]
    real = real & (visual | (kind != Kind.VISUAL))
  flat = share.reshape(-1, share.shape[-1])
  rows = np.where(visual[..., None], flat[place], 0.0)
  return np.asarray(RealFirst.of(jnp.asarray(real)).apply(jnp.asarray(rows)))


def _of_language(
  language: Sequence[Sequence[np.ndarray]], rows: np.ndarray
) -> list[Stage]:
  """Stages in the language model."""
  stages, now, every = [], rows, [rows]
  for i, plans in enumerate(language):
    for plan in plans:
      if plan.shape[-1] != now.shape[1]:
        # What was reduced before has come back: the plan is of all tokens.
        (now,) = [x for x in every if x.shape[1] == plan.shape[-1]][:1]
      now = plan @ now
      every.append(now)
    if plans:
      stages.append(Stage(f"language, block {i + 1}", now))
  return stages


def attention(
  config: VisionLanguageConfig, params: Any, prompts: Prompts
) -> np.ndarray:
  """What the last token attends to among the patches, in the plain model.

  Means over heads of each block of the language model, `[blocks, b, patches]`,
  as shares of all attention of that token.
  """
  model = VisionLanguage(config, Slots(collect=(LAST,)))

  @quick.jit
  def run(params, prompts):
    out = model.apply({"params": params}, prompts)[1]
    return [answers.values[0] for answers in out["signals"]]

  maps = np.stack(jax.device_get(run(params, prompts)))
  visual = np.asarray((prompts.kind == Kind.VISUAL) & prompts.valid)
  front = len(config.vision.kinds) if config.pass_class else 0
  rows = zip(maps.swapaxes(0, 1), visual, strict=True)
  own = [x[:, mask] for x, mask in rows]
  return np.stack(own, axis=1)[..., front:]
