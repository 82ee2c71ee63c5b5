"""Prefill and decode of a vision-language model, with and without recipes.

  python -m scripts.bench_vlm [--width 4096] [--depth 2] [--repeats 3] [--cpu]
  python -m scripts.bench_vlm --choosing
  python -m scripts.bench_vlm --decoding 8 [--width 1024] [--repeats 5]

Layers have the shapes of LLaVA-1.5-7B, with fewer blocks and a vocabulary of
1000. All models are measured in turns in one process; times are the best of the
repeats. FLOPs are those that the compiler counts for the whole step, vision
tower and selection included. A row each: name, tokens of the prompt, GFLOPs of
prefill and its share, milliseconds of prefill and its share, share of time over
share of FLOPs, milliseconds of a decode step, MiB of the cache. With --cpu
times are those that all threads of the process spent, for a machine that is
shared.

With --choosing nothing runs: for each recipe, by how much the compiler's FLOPs
fall if it keeps the last tokens instead, as many at the same place, in percent
of the FLOPs of the plain prefill.

With --decoding, prompts have that many images, of which `random_visual` keeps a
fraction. A row each: the fraction, tokens of the prompt, MiB of the cache,
milliseconds of a decode step and their share of those with all tokens, and the
share of the bytes that a step reads: parameters of the language model, cache.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from tokjax import budgets, recipes
from tokjax.analysis import cost
from tokjax.models import (
  DecoderConfig,
  VisionLanguage,
  VisionLanguageConfig,
  VisionLanguageGenerator,
  ViTConfig,
  vlm_generation,
)
from tokjax.models.projector import ProjectorConfig
from tokjax.models.vlm import Prompts
from tokjax.reduce.rules import KEEP_NEWEST
from tokjax.slots import Slots

IMAGE, TEXT, DECODE = 999, 63, 64


def config(width: int, depth: int) -> VisionLanguageConfig:
  """LLaVA-1.5 with few blocks; heads are 128 wide."""
  vision = ViTConfig(
    image_size=336, patch_size=14, width=1024, depth=2, heads=16, mlp_dim=4096,
    num_classes=None, pool="none", pre_norm=True, patch_bias=False,
    activation="quick_gelu", epsilon=1e-5,
  )  # fmt: skip
  language = DecoderConfig(
    vocabulary=1000, width=width, depth=depth, heads=width // 128,
    kv_heads=width // 128, mlp_dim=width * 43 // 16, length=8192, tied=False,
  )  # fmt: skip
  return VisionLanguageConfig(
    vision, ProjectorConfig(width), language, IMAGE, ahead=True
  )


def slots(depth: int) -> dict[str, Slots]:
  """What is compared."""
  fast = recipes.get("fastv", layer=depth // 2)
  return {
    "plain": Slots(),
    "visionzip 64": recipes.get("visionzip"),
    "fastervlm 144": recipes.get("fastervlm"),
    "divprune 0.098": recipes.get("divprune"),
    "avgpool 12x12": recipes.get("avgpool_visual", budget=budgets.Square(0.25)),
    "fastv": fast,
    "visionzip 64 + fastv": recipes.compose("visionzip", fast),
  }


def params_of(config: VisionLanguageConfig, drawn: bool = True):
  """Random parameters, drawn on the host, or their shapes."""
  row = jnp.zeros((1, 2), jnp.int32)
  images = jnp.zeros((1, *config.vision.image_sides, 3))
  prompts = Prompts(row, row, row, row[0, :1], images)
  shapes = jax.eval_shape(
    VisionLanguage(config).init, jax.random.key(0), prompts
  )["params"]
  if not drawn:
    return shapes
  rng = np.random.default_rng(0)
  draw = lambda leaf: jnp.asarray(
    rng.standard_normal(leaf.shape, np.float32) * 0.02
  )
  return jax.tree.map(draw, shapes)


def without_choosing(slots: Slots) -> Slots:
  """The same with rules that keep the last tokens and ask nothing."""
  own = lambda one: dataclasses.replace(
    one,
    reduce=tuple(
      dataclasses.replace(r, rule=KEEP_NEWEST, at_most=1.0)
      for r in one.reduce
    ),
  )
  towers = tuple((name, own(one)) for name, one in slots.towers)
  return dataclasses.replace(own(slots), towers=towers)


def choosing(own: VisionLanguageConfig, prompt, image) -> None:
  """What it costs to choose tokens, in FLOPs."""
  shapes = params_of(own, drawn=False)

  def flops(slots: Slots) -> float:
    model = VisionLanguage(own, slots)
    tokens = TEXT + vlm_generation.tokens_per_image(own, slots)
    generator = VisionLanguageGenerator(
      model, shapes, tokens, DECODE, buckets=(TEXT, tokens)
    )
    packed, room = generator.pack([prompt], [[image]])
    run = lambda p, x: vlm_generation.prefill(
      model, p, x, DECODE, None, room
    ).logits
    return cost.measure(run, shapes, packed).flops

  plain = flops(Slots())
  print("name\tchoosing, % of the plain prefill")
  for name, slots_ in slots(own.language.depth).items():
    if name in ("plain", "avgpool 12x12"):
      continue
    more = flops(slots_) - flops(without_choosing(slots_))
    print(f"{name}\t{100 * more / plain:.2f}", flush=True)


def decoding(own: VisionLanguageConfig, images: int, repeats: int) -> None:
  """How the time of a decode step follows what is kept."""
  params = params_of(own)
  rng = np.random.default_rng(1)
  prompt = [*[IMAGE] * images, *rng.integers(1, IMAGE, TEXT).tolist()]
  photo = rng.normal(size=(336, 336, 3)).astype(np.float32)
  made, held, steps = {}, {}, {}
  for keep in (1.0, 0.5, 0.25, 0.125):
    filled = recipes.get("random_visual", keep=keep) if keep < 1 else Slots()
    tokens = TEXT + images * vlm_generation.tokens_per_image(own, filled)
    generator = VisionLanguageGenerator(
      VisionLanguage(own, filled), params, tokens, DECODE, buckets=(tokens,)
    )
    key = jax.random.key(0)
    going = generator.prefill([prompt], [[photo] * images], key)
    held[keep] = (tokens, generator.bytes(going).physical)
    made[keep] = (generator, going)
  token = jnp.asarray([5], jnp.int32)
  for _ in range(repeats + 1):
    for keep, (generator, going) in made.items():
      begin = time.perf_counter()
      for _ in range(4):
        going = generator.step(going, token)
      jax.block_until_ready(going)
      steps.setdefault(keep, []).append((time.perf_counter() - begin) / 4)
      made[keep] = (generator, going)
  weights = sum(x.size * 4 for x in jax.tree.leaves(params["language"]))
  print("kept\ttokens\tcache MiB\tstep ms\tshare\tshare of bytes")
  best = {keep: min(times[1:]) for keep, times in steps.items()}
  for keep, (tokens, cache) in held.items():
    read = (weights + cache) / (weights + held[1.0][1])
    print(
      f"{keep}\t{tokens}\t{cache / 2**20:.1f}\t{best[keep] * 1e3:.1f}"
      f"\t{best[keep] / best[1.0]:.2f}\t{read:.2f}"
    )


def main() -> None:
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--width", type=int, default=4096)
  parser.add_argument("--depth", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--cpu", action="store_true")
  parser.add_argument("--choosing", action="store_true")
  parser.add_argument("--decoding", type=int, default=0)
  args = parser.parse_args()
  clock = time.process_time if args.cpu else time.perf_counter
  own = config(args.width, args.depth)
  if args.decoding:
    decoding(own, args.decoding, args.repeats)
    return
  rng = np.random.default_rng(1)
  image = rng.normal(size=(336, 336, 3)).astype(np.float32)
  prompt = [IMAGE, *rng.integers(1, IMAGE, TEXT).tolist()]
  if args.choosing:
    choosing(own, prompt, image)
    return
  params = params_of(own)
  made, flops, prefill, step, held = {}, {}, {}, {}, {}
  for name, filled in slots(args.depth).items():
    model = VisionLanguage(own, filled)
    tokens = TEXT + vlm_generation.tokens_per_image(own, filled)
    generator = VisionLanguageGenerator(
      model, params, tokens, DECODE, buckets=(TEXT, tokens)
    )
    packed, room = generator.pack([prompt], [[image]])
    run = lambda p, x, m=model, r=room: vlm_generation.prefill(
      m, p, x, DECODE, None, r
    ).logits
    flops[name] = cost.measure(run, params, packed).flops
    made[name] = (generator, packed, room)
  for _ in range(args.repeats + 1):
    for name, (generator, packed, room) in made.items():
      begin = clock()
      whole = generator.language.one_program
      run = vlm_generation.prefill_whole if whole else vlm_generation.prefill
      going = run(generator.model, params, packed, DECODE, None, room)
      jax.block_until_ready(going)
      prefill.setdefault(name, []).append(clock() - begin)
      held[name] = generator.bytes(going).physical
      token = jnp.asarray([5], jnp.int32)
      going = jax.block_until_ready(generator.step(going, token))
      begin = clock()
      for _ in range(4):
        going = generator.step(going, token)
      jax.block_until_ready(going)
      step.setdefault(name, []).append((clock() - begin) / 4)
  print("name\ttokens\tGFLOP\tshare\tms\tshare\ttime/FLOPs\tstep ms\tMiB")
  best = {name: min(times[1:]) for name, times in prefill.items()}
  for name, (_, packed, _) in made.items():
    part = flops[name] / flops["plain"]
    spent = best[name] / best["plain"]
    print(
      f"{name}\t{int(packed.length[0])}\t{flops[name] / 1e9:.1f}\t{part:.3f}"
      f"\t{best[name] * 1e3:.0f}\t{spent:.3f}\t{spent / part:.2f}"
      f"\t{min(step[name][1:]) * 1e3:.1f}\t{held[name] / 2**20:.2f}"
    )


if __name__ == "__main__":
  main()
