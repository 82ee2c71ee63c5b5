"""Every training-free method on scikit-learn's digits, in about five minutes.

python -m experiments.sweep --config configs/digits_pareto.py --workdir DIR

Trains the model of `digits.py` (98 % or better on held-out images), then
compares accuracy, FLOPs and speed of all methods at four keep ratios. Nothing
is downloaded.
"""

import ml_collections

from configs import digits


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "" or "runlocal" (two training steps, three methods, for tests)."""
  config = ml_collections.ConfigDict()
  config.subject = dict(name="trained", train=digits.get_config(arg))
  config.recipes = ()
  config.keeps = (0.9, 0.6, 0.4, 0.2)
  config.batch_size, config.rounds = 72, 4
  if arg == "runlocal":
    config.recipes, config.keeps = ("random", "tome", "avgpool"), (0.5,)
    config.rounds, config.pictures = 2, 2
  return config
