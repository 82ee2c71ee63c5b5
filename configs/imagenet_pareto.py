"""Every training-free method on a pretrained model and a dataset by name.

python -m experiments.sweep --config configs/imagenet_pareto.py --workdir DIR
python -m experiments.sweep --config configs/imagenet_pareto.py:imagenette \
  --workdir DIR

The first takes DeiT-S from the Hugging Face hub and the first 1000 images of
ImageNet's validation set; `--config.subject.data.heldout=None` takes all
50 000. ImageNet is prepared once by hand (see tensorflow-datasets). The
second, ten of its classes, can simply be downloaded:

python -m experiments.data.tfds_source --builder imagenette/320px-v2

Any other classification builder or checkpoint:
`--config.subject.data.builder=NAME --config.subject.checkpoint=FOLDER_OR_ID`;
where the labels are not those of the checkpoint, `subject.classes` maps them.
Twelve blocks take several times longer to compile than the digits' four.
"""

import ml_collections

# ImageNet's class of each of imagenette's labels.
IMAGENETTE = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)


def get_config(arg: str = "imagenet2012") -> ml_collections.ConfigDict:
  """`arg`: "imagenet2012" or "imagenette"."""
  config = ml_collections.ConfigDict()
  data = ml_collections.ConfigDict()
  data.name, data.builder = "tfds_images", "imagenet2012"
  data.test, data.num_classes = "validation", 1000
  # A placeholder may be set to None on the command line.
  data.heldout = ml_collections.config_dict.placeholder(int)
  data.heldout = 1000
  data.data_dir = ml_collections.config_dict.placeholder(str)
  config.subject = dict(
    name="pretrained", checkpoint="facebook/deit-small-patch16-224", data=data,
    classes=(), precision="float32",
  )  # fmt: skip
  if arg == "imagenette":
    data.builder, data.num_classes = "imagenette/320px-v2", len(IMAGENETTE)
    config.subject.classes = IMAGENETTE
  elif arg != "imagenet2012":
    raise ValueError(f"arg={arg!r}: must be 'imagenet2012' or 'imagenette'")
  config.recipes = ()
  config.keeps = (0.9, 0.7, 0.5, 0.35, 0.2)
  config.batch_size = 32
  return config
