"""Every training-free method where it matters which tokens stay.

python -m experiments.sweep --config configs/grid_pareto.py --workdir DIR

The largest of four digits among 32 scrambled ones: the model of
`configs/learned/backbone.py`, which cannot know the answer before its first
attention. Two seeds; accuracy with intervals, FLOPs and speed of all methods
at three keep ratios, in about five minutes on two CPU cores. Nothing is
downloaded. More seeds: `--config.subject.seeds=5`.
"""

import ml_collections

from configs.learned import backbone


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "" or "runlocal" (two training steps, three methods, for tests)."""
  config = ml_collections.ConfigDict()
  config.subject = dict(
    name="trained", train=backbone.get_config(arg), seeds=2
  )
  config.recipes = ()
  config.keeps = (0.6, 0.3, 0.15)
  config.shares = (0.85, 0.75, 0.65)
  config.batch_size, config.rounds = 120, 4
  if arg == "runlocal":
    # Some methods reduce from the second block on.
    config.subject.train.model.depth = 2
    config.recipes, config.keeps = ("random", "tome", "avgpool"), (0.5,)
    config.rounds, config.pictures = 2, 2
  return config
