"""FLASH's draft on captions of a grid: how many guesses are right.

    python -m scripts.learned_drafts --workdir DIR [--local]

Trains the model of `configs/learned/drafts.py` to read grids of digits aloud
and drafts on it, and prints for each the tokens that a step of the model gives
on held-out images (1 without speculation), with a 95 % interval over images,
and how many parameters the draft has. Before training its modules are drawn at
random. `avgpool_visual` is the model itself, which reads a quarter of the
visual tokens, as its own draft. Texts are compared with greedy ones. Runs that
are there are not made again.
"""

import argparse
import dataclasses
import pathlib

import jax
import numpy as np

from configs.learned import drafts
from experiments.data.words import END, IMAGE, START
from experiments.sweeps import intervals
from experiments.training import config as config_lib
from scripts.learned_questions import params_of, with_fresh
from tokjax import recipes
from tokjax.models import Speculative, VisionLanguage, VisionLanguageGenerator

LATENTS = (4, 1, 0)


def generator(config, slots, params) -> VisionLanguageGenerator:
  """Of captions; one bucket for all."""
  model = VisionLanguage(config.model, slots)
  side = config.data.side
  room = 2 + model.config.vision.num_patches
  return VisionLanguageGenerator(
    model, params, room, side**2 + 1, buckets=(room,)
  )


def said(fast: Speculative, config, plain: VisionLanguageGenerator) -> str:
  """Tokens a step on held-out images, and how many texts are the greedy ones.

  A quarter of the images is taken at a time.
  """
  count, size = config.data.heldout, -(-config.data.heldout // 4)
  per, same = [], 0
  for begin in range(0, count, size):
    numbers = range(begin, min(begin + size, count))
    images = [[config.data.caption(i)[0].astype(np.float32)] for i in numbers]
    prompts = [[START, IMAGE]] * len(images)
    texts, rounds = fast.generate(prompts, images, ends=(END,))
    greedy = plain.generate(prompts, images, ends=(END,))
    same += sum(a == b for a, b in zip(texts, greedy, strict=True))
    per += (rounds.tokens / rounds.rounds).tolist()
  found = intervals.difference(np.array([per]))
  return f"{found.mean:.2f} ± {found.half:.2f}\t{same} of {count}"


def main() -> None:
  """Trains, counts, prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--local", action="store_true", help="two steps")
  args = parser.parse_args()
  root = args.workdir.resolve()
  local = ",runlocal" if args.local else ""
  start = params_of(drafts.get_config(local[1:]), root / "target")
  target = config_lib.load(drafts.get_config(local[1:]))
  plain = generator(target, recipes.get("none"), start)
  print("draft\tparameters\ttokens a step\tgreedy texts", flush=True)
  few = generator(target, recipes.get("avgpool_visual", keep=0.25), start)
  few = dataclasses.replace(few, capacity=plain.capacity)
  fast = Speculative(plain, few, ahead=4)
  print("avgpool_visual\t0", said(fast, target, plain), sep="\t", flush=True)
  for latents in LATENTS:
    given = f"backbone={root / 'target'},latents={latents}{local}"
    config = drafts.get_config(given)
    loaded = config_lib.load(config)
    model = loaded.build_model()
    name = f"flash, {latents or 'all'} latents"
    for when in ("before", "after"):
      params = (
        with_fresh(loaded, model, start)
        if when == "before"
        else params_of(config, root / f"draft-{latents}")
      )
      own = params["language"]["draft"]
      size = sum(x.size for x in jax.tree.leaves(own))
      made = generator(target, model.slots, params)
      text = said(Speculative(made), target, plain)
      print(f"{name}, {when}", size, text, sep="\t", flush=True)


if __name__ == "__main__":
  jax.config.update("jax_platforms", "cpu")
  main()
