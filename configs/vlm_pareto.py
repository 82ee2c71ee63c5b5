"""Every visual-token method on a small vision-language model trained here.

python -m experiments.sweep --config configs/vlm_pareto.py --workdir DIR
python -m experiments.sweep \\
  --config configs/vlm_pareto.py:checkpoint=FOLDER,questions=FILE.jsonl \\
  --workdir DIR

Trains the model of `vlm_grid.py` from two seeds, then compares right answers by
kind of question, FLOPs, bytes of the cache and times of all methods that need
no training at three budgets; random tokens and average pooling are among them.
Nothing is downloaded. With a checkpoint, that model answers the questions of a
file: one JSON object a line with "image", "question", "answer" and "kind".
"""

import ml_collections

from configs import common, vlm_grid

# Options for a language model of four blocks and an encoder of two.
SMALL = {"vtc_cls": dict(blocks=2)}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """`arg`: "checkpoint=...", "questions=...", "runlocal" (three methods).

  "data=easy_vqa" trains the model of `vlm_grid.py` on other questions.
  """
  values = common.parse_arg(arg, checkpoint="", questions="", data="grid")
  if bool(values.checkpoint) != bool(values.questions):
    raise ValueError("checkpoint and questions: give both, or none of the two")
  local = f"data={values.data}" + ",runlocal" * values.runlocal
  config = ml_collections.ConfigDict()
  if values.checkpoint:
    config.subject = dict(
      name="published_questions", checkpoint=values.checkpoint,
      questions=values.questions, precision="float32",
    )  # fmt: skip
    config.answer = 8
  else:
    config.subject = dict(
      name="trained_questions", train=vlm_grid.get_config(local), seeds=2
    )
    config.options = SMALL
  config.recipes = ()
  config.keeps = (0.5, 0.25, 0.125)
  config.batch_size, config.rounds = 60, 3
  if values.checkpoint:
    config.batch_size = 2
  if values.runlocal:
    if not values.checkpoint:
      config.subject.update(seeds=1, questions=8)
    config.recipes = ("random_visual", "fastervlm", "fastv")
    config.options, config.keeps = {}, (0.5,)
    config.batch_size, config.rounds, config.steps = 4, 2, 2
    config.picture_keep, config.pictures = 0.5, 2
  return config
