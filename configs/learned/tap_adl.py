"""TAP + ADL on digits: attention on locally pooled tokens, trained diverse.

python -m experiments.train --workdir DIR \\
  --config configs/learned/tap_adl.py:backbone=BACKBONE

Saves nothing: what counts is the accuracy on corrupted images.
"""

import ml_collections

from configs.learned import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: see `base`."""
  values = base.parse_arg(arg)
  config = base.start(values)
  config.recipe = dict(name="tap_adl")
  return config
