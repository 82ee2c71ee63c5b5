"""Text from a prompt with any recipe of the slots `attend` and `cache`.

python -m experiments.generate --config configs/generate.py --prompt "import "
python -m experiments.generate \\
  --config configs/generate.py:recipe=snapkv,keep=0.25,window=16
python -m experiments.generate \\
  --config configs/generate.py:checkpoint=Qwen/Qwen2.5-0.5B --prompt "Paris is"

Without a checkpoint the byte model of `text.py` is trained first (a few
minutes on two CPU cores) and kept in the workdir.
"""

import ml_collections
from ml_collections import config_dict

from configs import common, text


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "recipe=...", "keep=...", "checkpoint=...", "runlocal"; other names
  are options of the recipe."""
  values = common.parse_arg(
    arg, others="options", recipe="none", keep=float, checkpoint=str
  )
  config = ml_collections.ConfigDict()
  if values.checkpoint is not None:
    config.carrier = dict(name="pretrained", checkpoint=values.checkpoint)
  else:
    local = "runlocal" if values.runlocal else ""
    config.carrier = dict(name="trained", train=text.get_config(local))
  config.recipe = common.recipe(values.recipe, values.keep)
  config.recipe.update(options=values.options.to_dict())
  config.prompt = "import os\n\ndef "
  config.tokens = 8 if values.runlocal else 128
  config.capacity = config_dict.placeholder(int)
  config.chunk = config_dict.placeholder(int)
  config.sampler = dict(
    temperature=0.0, top_k=config_dict.placeholder(int), top_p=1.0
  )
  config.seed = 0
  return config
