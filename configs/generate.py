"""Text from a prompt with any recipe of the slots `attend` and `cache`.

python -m experiments.generate --prompt "The capital of France is"
python -m experiments.generate \\
  --config configs/generate.py:recipe=snapkv,keep=0.25,window=16
python -m experiments.generate \\
  --config configs/generate.py:checkpoint=Qwen/Qwen2.5-0.5B --prompt "Paris is"

Without a checkpoint the model is SmolLM2 if it was fetched (`tokjax models get
smollm2`, 98 MB; it also needs the extra gguf), and otherwise the byte model of
`text.py`, which is trained first (a few minutes on two CPU cores) and kept in
the workdir; `model=bytes` asks for that one.
"""

import ml_collections
from ml_collections import config_dict

from configs import common, text
from tokjax import zoo

MODEL = "smollm2"


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "recipe=...", "keep=...", "checkpoint=...", "model=...", "runlocal";
  other names are options of the recipe."""
  values = common.parse_arg(
    arg, others="options", recipe="none", keep=float, checkpoint=str, model=str
  )
  config = ml_collections.ConfigDict()
  checkpoint = checkpoint_of(values)
  if checkpoint is not None:
    config.language_model = dict(name="pretrained", checkpoint=checkpoint)
  else:
    local = "runlocal" if values.runlocal else ""
    config.language_model = dict(name="trained", train=text.get_config(local))
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
  config.chat = False
  config.stop = ()
  config.batch = 8
  return config


def checkpoint_of(values: ml_collections.ConfigDict) -> str | None:
  """The checkpoint that is read; None: a model of bytes is trained.

  Raises:
    ValueError: both are given, or a model that is neither of `tokjax models`
      nor "bytes".
  """
  if values.model is None:
    there = zoo.find(MODEL) is not None
    default = MODEL if there and not values.runlocal else None
    return default if values.checkpoint is None else values.checkpoint
  if values.checkpoint is not None:
    raise ValueError("model and checkpoint: give one of the two")
  if values.model == "bytes":
    return None
  zoo.known(values.model)
  return values.model
