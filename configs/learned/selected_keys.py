"""SPT, LeMo and DHSA on associative recall: what they select by is learned.

python -m experiments.train --workdir BACKBONE \\
  --config configs/recall.py:length=64 --config.steps=1000
python -m experiments.train --workdir FIRST \\
  --config configs/learned/selected_keys.py:method=spt,backbone=BACKBONE
python -m experiments.train --workdir DIR \\
  --config configs/learned/selected_keys.py:method=spt,stage=use,backbone=FIRST

First codewords or predictors learn on a frozen dense model for 150 steps, as in
the papers. Then the model is fine-tuned with what they select (SPT and LeMo;
DHSA leaves the model as it is). `scripts/learned_keys.py` runs all of it.
"""

import ml_collections

from configs import common, recall
from configs.learned import base

# Of 64 tokens: SPT's queries see 2 keys (with 8, as published, any codewords do
# in texts this short); LeMo keeps half of the blocks, in the
# two layers without a window; DHSA's blocks of queries see 16 tokens.
KEEP = {"spt": 1 / 32, "lemo": 1 / 2, "dhsa": 1 / 4}
OPTIONS = {
  "spt": {},
  "lemo": dict(block=4, from_layer=1, to_end=True, hidden=64),
  "dhsa": dict(block=8, first=2, near=4, exact=0, apart=1, certainty=1.0),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: method; stage: "learn" or "use"; backbone: workdir; runlocal."""
  values = common.parse_arg(arg, method="spt", stage="learn", backbone="")
  if values.method not in KEEP:
    raise ValueError(f"method={values.method!r}: must be one of {[*KEEP]}")
  if values.stage not in ("learn", "use"):
    raise ValueError(f"stage={values.stage!r}: must be 'learn' or 'use'")
  local = "runlocal" if values.runlocal else ""
  config = recall.get_config(",".join(filter(None, ["length=64", local])))
  if values.backbone:
    config.init = values.backbone
  learns = values.stage == "learn"
  config.recipe = dict(
    name=values.method,
    keep=KEEP[values.method],
    options=dict(OPTIONS[values.method], learns=learns),
  )
  if values.method == "spt" and learns:
    config.recipe["options"]["dense"] = True
  config.optimizer.update(lr=3e-3 if learns else 1e-3, warmup=10)
  if learns:
    config.optimizer.update(freeze=base.only("slots"), weight_decay=0.0)
  if not values.runlocal:
    if values.method == "dhsa":
      # Blocks see the first and the last tokens anyway: not in short contexts.
      config.data.least = 40
      config.optimizer.lr = 1e-2
    config.steps, config.checkpoint.every = 150, 150
    config.batch_size = 32
  return config
