"""Every cache and attention method on small language models trained here.

python -m experiments.sweep --config configs/kv_pareto.py --workdir DIR
python -m experiments.sweep --config configs/kv_pareto.py:checkpoint=NAME \\
  --workdir DIR

Trains two models, one on associative recall (`recall.py`) and one on the
source of Python's standard library (`text.py`), then compares recall by depth
and length, recall of several keys, perplexity, bytes and decode time of all
methods that need no training. Nothing is downloaded. With a checkpoint, the
needles are sentences in a text and that model answers both.
"""

import ml_collections

from configs import common, recall, text
from tokjax import budgets

# Options for contexts of 200 tokens and models of three blocks: the recipes'
# own defaults are made for contexts of thousands and dozens of blocks.
SMALL = {
  "streaming_llm": dict(first=1),
  "snapkv": dict(window=8, kernel=3),
  "pyramidkv": dict(window=8, kernel=3),
  "adakv": dict(window=8, kernel=3),
  "expected_attention": dict(sinks=1, future=64),
  "razor_attention": dict(first=1, window=budgets.Share(0.2)),
  "kivi": dict(group=16, residual=32),
  "vidkv": dict(group=16, buffer=32),
  "zipcache": dict(gap=16),
  "quest": dict(page=4, least=1, from_layer=0),
  "tidaldecode": dict(layers=(1,)),
  "delta": dict(page=4, newest=1, layers=(1,)),
  "minference_a_shape": dict(first=4),
  "minference_vertical_slash": dict(
    queries=8,
    sinks=1,
    near=8,
    least_vertical=1,
    least_slash=8,
    block=4,
  ),
  "xattention": dict(stride=4, block=16),
  "sepllm": dict(tokens=(0, 10), first=1, separators=16),
  "cca": dict(group=4),
  "dhsa": dict(block=8, first=4, near=8, exact=8),
  # Without training: by what the networks learn to predict.
  "lemo": dict(block=8, last=1, from_layer=1, predicts=False),
  "infllm": dict(first=4, local=32, block=8, chunk=16),
  "actqkv": dict(first=4, local=32, block=8, chunk=16, least=1),
  "tokenselect": dict(first=4, local=32, chunk=16),
  "longheads": dict(chunk=16),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "checkpoint=...", "runlocal" (three methods, for tests)."""
  values = common.parse_arg(arg, checkpoint="")
  local = "runlocal" if values.runlocal else ""
  config = ml_collections.ConfigDict()
  if values.checkpoint:
    config.subject = dict(
      name="checkpoint", checkpoint=values.checkpoint, precision="float32",
      data=dict(name="standard_library"),
      more=(dict(name="language_reference"),),
    )  # fmt: skip
    config.grid = dict(
      lengths=(512, 1024, 2048), texts=2, several=4, pairs=4, turns=3,
      known=False,
    )
  else:
    config.subject = dict(
      name="trained_pair", recall=recall.get_config(local),
      text=text.get_config(local),
    )  # fmt: skip
    if not local:
      config.subject.first = recall.get_config("length=48")
    config.grid = dict(lengths=(64, 128, 192), texts=8, several=16, known=False)
    config.options = SMALL
    # Compiling costs more than padding on models of this size.
    config.buckets = (208,)
  config.recipes = ()
  config.keeps = (0.5, 0.25, 0.125)
  config.batch_size, config.texts = 16, 32
  config.context, config.steps = 96, 32  # as long as `text.py` is trained
  if values.checkpoint:
    config.batch_size, config.texts = 4, 8
    config.context, config.steps = 512, 64
  if values.runlocal:
    config.recipes, config.keeps = ("random_kv", "streaming_llm"), (0.5,)
    config.picture_keep, config.rounds, config.batch_size = 0.5, 2, 4
    config.grid.update(
      lengths=(8, 16), depths=(0.0, 1.0), texts=1, several=2, pairs=4, turns=1
    )
    config.buckets = (24,)
    if values.checkpoint:  # Sentences are longer than pairs.
      config.grid.lengths, config.buckets = (160, 176), ()
    config.texts, config.context, config.steps = 4, 16, 4
  return config
