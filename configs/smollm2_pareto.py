"""Caches and attention methods on SmolLM2-135M, a real model.

python -m tokjax models get smollm2
python -m experiments.sweep --config configs/smollm2_pareto.py --workdir DIR
python -m experiments.sweep --config configs/smollm2_pareto.py:every \\
  --workdir DIR

Needles, several of them, chains of variables and common words in 1024 tokens of
Python's standard library, and the likelihood of such code and of prose. Eight
methods with a quarter of the cache; or every one with a half, a quarter and an
eighth, where questions share contexts. docs/real_models.md says how long that
takes. A run that is stopped goes on where it was.
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
  """`arg`: "every", "model=..." (of `tokjax models`), "keep=...", "length=...".

  "length2=..." adds a second length.
  """
  values = common.parse_arg(
    arg, model="smollm2", keep=0.25, length=1024, length2=0, every=False
  )
  config = kv_pareto.get_config(f"checkpoint={values.model}")
  config.recipes, config.keeps = RECIPES, (values.keep,)
  config.picture_keep = values.keep
  lengths = tuple(n for n in (values.length, values.length2) if n)
  count = 2 if values.every else 4
  config.grid = dict(
    lengths=lengths, depths=(0.0, 0.5, 1.0), texts=count, several=4, pairs=4,
    turns=3, also_known=count, values=count, tracking=count, words=count,
    known=False,
  )  # fmt: skip
  config.batch_size, config.texts, config.rounds = 4, count, 2
  if values.every:
    # Ten times the rows, most of which need a prefill of their own: it answers
    # all questions about a context. Several values, chains and common words
    # are beyond this model with the full cache too, and take two thirds more
    # steps. Batches are small enough for contexts to go together.
    config.recipes, config.keeps = (), (0.25, 0.5, 0.125)
    config.grid.update(
      together=count, tasks=("single", "keys"), texts=0, several=0, values=0,
      tracking=0, words=0,
    )  # fmt: skip
    config.tokens, config.rounds = 4096, 1
  config.context, config.steps = values.length, 32
  if values.runlocal:
    config.recipes = ("random_kv",)
    config.grid.update(
      depths=(0.0,), texts=1, several=1, also_known=0, values=0, tracking=0,
      words=0, together=0, turns=1,
    )  # fmt: skip
    config.batch_size, config.texts, config.rounds = 1, 1, 2
    config.steps = 4
  return config
