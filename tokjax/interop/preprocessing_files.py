"""Preprocessing of a folder, and as `transformers` publishes it."""

import math
import pathlib
from typing import Any

from tokjax.interop import fields, files, preprocessing_timm
from tokjax.interop.fields import Json, Problems
from tokjax.interop.preprocessing import Preprocessing, fraction

VIDEO_FILE = "video_preprocessor_config.json"
HF_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
# Pillow's numbers, as transformers stores them.
RESAMPLE = {
  0: "nearest",
  1: "lanczos",
  2: "bilinear",
  3: "bicubic",
  4: "box",
  5: "hamming",
}
HALF = [0.5] * 3
ON = {
  "do_resize": True,
  "do_rescale": True,
  "rescale_factor": 1 / 255,
  "do_normalize": True,
  "do_center_crop": False,
  "default_to_square": True,
}
VIT = {
  **ON,
  "size": {"height": 224, "width": 224},
  "resample": 2,
  "image_mean": HALF,
  "image_std": HALF,
}
CLIP = {
  **ON,
  "size": {"shortest_edge": 224},
  "default_to_square": False,
  "do_center_crop": True,
  "crop_size": {"height": 224, "width": 224},
  "resample": 3,
  "image_mean": [0.48145466, 0.4578275, 0.40821073],
  "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# What each processor class does where its file is silent (transformers 5.24).
PROCESSORS: dict[str, Json] = {
  "ViT": VIT,
  "DeiT": {
    **VIT,
    "size": {"height": 256, "width": 256},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "resample": 3,
  },
  "CLIP": CLIP,
  "Llava": CLIP,
  # Crops are told by the model, and padding is of a batch.
  "LlavaNext": {**CLIP, "do_pad": True, "image_grid_pinpoints": None},
  "LlavaOnevision": {
    **CLIP,
    "size": {"height": 384, "width": 384},
    "do_center_crop": False,
    "do_pad": True,
    "image_grid_pinpoints": None,
  },
  "LlavaOnevisionVideo": {
    **CLIP, "size": {"height": 384, "width": 384}, "do_center_crop": False
  },
  # The number of tiles is read with the model.
  "GotOcr2": {
    **CLIP,
    "size": {"height": 384, "width": 384},
    "default_to_square": True,
    "do_center_crop": False,
    "crop_to_patches": True,
    "min_patches": 1,
    "max_patches": 12,
  },
  "Bit": CLIP,
  "Siglip": {**VIT, "resample": 3, "default_to_square": False},
}
ENDINGS = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor")
ENDINGS += ("FeatureExtractor",)
# The processor of a model, where the file does not name one.
OF_MODEL = {
  "vit": "ViT",
  "vit_mae": "ViT",
  "deit": "DeiT",
  "clip": "CLIP",
  "clip_vision_model": "CLIP",
  "llava": "Llava",
  "llava_next": "LlavaNext",
  "llava_onevision": "LlavaOnevision",
  "internvl": "GotOcr2",
  "siglip": "Siglip",
  "siglip_vision_model": "Siglip",
  "dinov2": "Bit",
  "dinov2_with_registers": "Bit",
}
# Which frames are taken, which is done before.
SAMPLING = {
  "video_processor_type", "do_sample_frames", "num_frames", "fps",
  "return_metadata", "video_metadata",
}  # fmt: skip
# Keys that do not change the pixels a model gets.
WITHOUT_EFFECT = {
  "image_processor_type", "feature_extractor_type", "processor_class",
  "model_input_names", "data_format", "input_data_format", "return_tensors",
  "device", "disable_grouping", "do_convert_rgb", "use_fast",
  "transformers_version", "_name_or_path", "_processor_class",
  "_valid_processor_keys", "_valid_kwargs_names",
}  # fmt: skip


def read(folder: pathlib.Path, channels: int = 3) -> Preprocessing | None:
  """The preprocessing a folder states, in either layout; None: it states none.

  Raises:
    ConfigError: it asks for something that `Preprocessing` does not do.
  """
  whole = files.read_json(folder / "config.json")
  if (found := stated(folder)) is not None:
    part, file = found
    with fields.problems_of(file):
      return from_hf(part, whole.get("model_type"), channels)
  published = preprocessing_timm.part_of(whole)
  if {"mean", "std"} & published.keys():
    return preprocessing_timm.from_timm(published, channels)
  return None


def read_video(folder: pathlib.Path, channels: int = 3) -> Preprocessing | None:
  """What a folder states of frames of LLaVA-OneVision; None: nothing.

  Raises:
    ConfigError: it asks for something that `Preprocessing` does not do.
  """
  found = stated(folder, VIDEO_FILE, "video_processor")
  if found is None:
    return None
  part, file = found
  with fields.problems_of(file):
    kind = part.get("video_processor_type")
    if kind not in (None, "LlavaOnevisionVideoProcessor"):
      raise fields.wrong(
        "video_processor_type", kind, "LlavaOnevisionVideoProcessor"
      )
    own = {k: v for k, v in part.items() if k not in SAMPLING}
    own["image_processor_type"] = "LlavaOnevisionVideo"
    return from_hf(own, channels=channels)


def stated(
  folder: pathlib.Path, own: str = HF_FILE, name: str = "image_processor"
) -> tuple[Json, str] | None:
  """What a folder of `transformers` states of images, and in which file.

  Args:
    folder: of a checkpoint.
    own: the file that states it alone.
    name: of the part in the file of transformers 5, which has all of them.
  """
  if (folder / own).exists():
    return files.read_json(folder / own), own
  if not (folder / PROCESSOR_FILE).exists():
    return None
  parts = files.read_json(folder / PROCESSOR_FILE)
  with fields.problems_of(PROCESSOR_FILE):
    part = fields.mapping(parts, name)
  return (part, PROCESSOR_FILE) if part else None


def processor_of(whole: Json, model_type: Any) -> str:
  """The processor class, without its ending."""
  for key in ("image_processor_type", "feature_extractor_type"):
    if whole.get(key) is not None:
      name = fields.string(whole, key)
      for ending in ENDINGS:
        name = name.removesuffix(ending)
      if name not in PROCESSORS:
        raise fields.wrong(key, whole[key], f"of {sorted(PROCESSORS)}")
      return name
  return fields.one_of(OF_MODEL)({"model_type": model_type}, "model_type")


def from_hf(
  whole: Json, model_type: Any = "vit", channels: int = 3
) -> Preprocessing:
  """A preprocessor_config.json.

  Args:
    whole: the file.
    model_type: of config.json; names the processor where the file does not.
    channels: of images; means may be one number for all of them.

  Raises:
    ConfigError: lists every key that cannot be followed.
  """
  problems = Problems(HF_FILE)
  values: dict[str, Any] = {}
  with problems.collect():
    defaults = PROCESSORS[processor_of(whole, model_type)]
    stated = {k: v for k, v in whole.items() if v is not None}
    part = {"crop_size": None, **defaults, **stated}
    unknown = set(stated) - WITHOUT_EFFECT - {"crop_size"} - set(defaults)
    fields.refuse(whole, sorted(unknown), problems)
    required_steps(part, problems)
    with problems.collect():
      values |= sizes_of(part)
    with problems.collect():
      values["interpolation"] = interpolation(part)
    values |= normalisation(part, channels, problems)
  return problems.build(Preprocessing, values)


def interpolation(part: Json) -> str:
  """The name of Pillow's number."""
  number = part["resample"]
  if not fields.is_integer(number) or number not in RESAMPLE:
    raise fields.wrong("resample", number, f"one of {RESAMPLE}")
  return RESAMPLE[number]


def required_steps(part: Json, problems: Problems) -> None:
  """Adds what is switched off and would have to stay on."""
  for key in ("do_resize", "do_rescale"):
    with problems.collect():
      if not fields.flag(part, key):
        raise ValueError(f"{key}=False is not supported")
  with problems.collect():
    factor = fields.number(part, "rescale_factor")
    if not math.isclose(factor, 1 / 255, rel_tol=1e-5):
      raise ValueError(f"rescale_factor={factor} is not supported")


def normalisation(part: Json, channels: int, problems: Problems) -> Json:
  """Mean and standard deviation; none: 0 and 1."""
  values: dict[str, Any] = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
  with problems.collect():
    if not fields.flag(part, "do_normalize"):
      return values
  for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
    with problems.collect():
      if fields.is_number(part[theirs]):
        found = (fields.number(part, theirs),) * channels
      else:
        found = fields.numbers(part, theirs)
      values[ours] = fields.per_channel(
        theirs, found, channels, positive=ours == "std"
      )
  return values


def sizes_of(part: Json) -> dict[str, Any]:
  """Size, crop and whether proportions are kept."""
  square = fields.flag(part, "default_to_square")
  size = sides_of(part, "size", "both" if square else "short")
  cropped, keep = fields.flag(part, "do_center_crop"), isinstance(size, int)
  if keep and not cropped:
    raise ValueError(
      f"size={part['size']!r} without do_center_crop gives images of any"
      " proportions, and is not supported"
    )
  resized = (size, size) if isinstance(size, int) else size
  crop = sides_of(part, "crop_size", "both") if cropped else resized
  if isinstance(crop, int) or (keep and crop[0] != crop[1]):
    raise fields.wrong(
      "crop_size", part["crop_size"], "square where size keeps proportions"
    )
  if any(c > r for c, r in zip(crop, resized, strict=True)):
    raise fields.wrong("crop_size", part["crop_size"], f"within size={resized}")
  share = fraction(crop[0], resized[0])
  if math.floor(crop[1] / share) != resized[1]:
    raise fields.wrong(
      "crop_size", part["crop_size"], f"in proportion to size={resized}"
    )
  return {"image_size": crop, "crop_fraction": share, "keep_aspect": keep}


def sides_of(part: Json, name: str, of_number: str) -> int | tuple[int, int]:
  """A shorter side, or height and width.

  Args:
    part: the file.
    name: "size" or "crop_size".
    of_number: what a bare number is, "short" or "both".
  """
  value = part[name]
  if fields.is_integer(value):
    side = fields.integer(part, name)
    return side if of_number == "short" else (side, side)
  if isinstance(value, list | tuple):
    value = dict(zip(("height", "width"), value, strict=False))
  if isinstance(value, dict) and value.keys() == {"shortest_edge"}:
    if name == "size":
      return fields.integer(value, "shortest_edge")
  if isinstance(value, dict) and value.keys() == {"height", "width"}:
    return fields.integer(value, "height"), fields.integer(value, "width")
  allowed = "a number or height and width"
  if name == "size":
    allowed += ", or shortest_edge"
  raise fields.wrong(name, part[name], allowed)


def to_hf(value: Preprocessing) -> dict[str, Any]:
  """A preprocessor_config.json.

  Raises:
    ValueError: it does what `transformers` does not.
  """
  (high, wide), (height, width) = value.resized_sides, value.sides
  if value.crop_rounding != "floor" and value.rounds:
    raise ValueError(
      "preprocessing: crop_rounding='half_even' cannot be written for"
      " transformers, which rounds down; take 'floor' if a shift of one pixel"
      " does not matter"
    )
  if value.keep_aspect and high != wide:
    raise ValueError(
      "preprocessing: keep_aspect=True of a rectangle cannot be written for"
      " transformers"
    )
  numbers = {name: number for number, name in RESAMPLE.items()}
  return {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "do_center_crop": (high, wide) != value.sides or value.keep_aspect,
    "crop_size": {"height": height, "width": width},
    "image_mean": list(value.mean),
    "image_std": list(value.std),
    # This class obeys every key here; the one of ViT never crops.
    "image_processor_type": "CLIPImageProcessor",
    "resample": numbers[value.interpolation],
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": high}
    if value.keep_aspect
    else {"height": high, "width": wide},
  }
