"""Block-sparse attention against dense, splash and FlexAttention.

python -m experiments.benchmark --config configs/bench/block_sparse.py \
    --workdir DIR

On an accelerator bfloat16 up to 32,768 tokens with 16 heads of 64 and 128; on
a CPU (`:cpu`) float32 up to 4,096 tokens with 8 heads of 128, about four
minutes on two cores. `--config.flex_on_cpu=True` lets PyTorch compile
FlexAttention with a C++ compiler.
"""

import ml_collections
from ml_collections import config_dict

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "cpu", "runlocal" (seconds, for tests), or neither."""
  arg = common.parse_arg(arg, cpu=False)
  config = ml_collections.ConfigDict()
  config.lengths = (4096, 8192, 16384, 32768)
  config.densities = (0.05, 0.1, 0.25, 0.5, 1.0)
  config.head_sizes = (64, 128)
  config.batches = (1,)
  config.directions = ("forward", "backward")
  config.heads = config.key_heads = 16
  config.block = 128
  config.dtype = "bfloat16"
  config.estimator = "mean_pooled"
  config.implementation = config_dict.placeholder(str)
  config.opponents = ("dense", "einsum", "splash", "flex")
  config.flex_on_cpu = False
  config.max_gib = 16.0
  config.rounds, config.seconds = 7, 0.5
  if arg.cpu or arg.runlocal:
    config.dtype = "float32"
    config.lengths, config.head_sizes = (1024, 4096), (128,)
    config.heads = config.key_heads = 8
    config.rounds, config.seconds = 5, 0.1
  if arg.runlocal:
    config.lengths, config.densities, config.head_sizes = (64,), (0.5,), (8,)
    config.heads, config.key_heads, config.block = 2, 1, 16
    config.opponents = ("dense", "flex")
    config.rounds, config.seconds = 2, 0.001
  return config
