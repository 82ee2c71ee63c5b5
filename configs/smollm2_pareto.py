"""Caches and attention methods on SmolLM2-135M, a real model.

python -m tokjax models get smollm2
python -m experiments.sweep --config configs/smollm2_pareto.py --workdir DIR

Needles of five digits in 1024 tokens of Python's standard library, judged by
the whole answer, and the likelihood of that text. Eight methods with a quarter
of the cache; about 45 minutes on two CPU cores, most of them compilation (see
docs/real_models.md). A run that is stopped goes on where it was.
"""

import ml_collections

from configs import common, kv_pareto

RECIPES = (
  "streaming_llm",
  "h2o",
  "snapkv",
  "expected_attention",
  "knorm",
  "kivi",
  "quest",
  "random_kv",
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "model=..." (of `tokjax models`), "keep=...", "length=..."."""
  values = common.parse_arg(arg, model="smollm2", keep=0.25, length=1024)
  config = kv_pareto.get_config(f"checkpoint={values.model}")
  config.recipes, config.keeps = RECIPES, (values.keep,)
  config.picture_keep = values.keep
  config.grid = dict(
    lengths=(values.length,), depths=(0.0, 0.5, 1.0), texts=4, several=4,
    pairs=4, known=False,
  )  # fmt: skip
  config.batch_size, config.texts, config.rounds = 4, 8, 3
  config.context, config.steps = values.length, 32
  if values.runlocal:
    config.recipes = ("random_kv",)
    config.grid.update(depths=(0.0,), texts=1, several=1)
    config.batch_size, config.texts, config.rounds = 1, 1, 2
    config.steps = 4
  return config
