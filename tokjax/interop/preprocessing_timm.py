"""Preprocessing as timm publishes it."""

from typing import Any

from tokjax.interop import fields
from tokjax.interop.fields import Json, Problems
from tokjax.interop.preprocessing import INTERPOLATIONS, Preprocessing

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def part_of(whole: Json) -> Json:
  """The part of timm's config.json on inputs; the oldest files have no part.

  Raises:
    ConfigError: it is no JSON object.
  """
  if "pretrained_cfg" not in whole:
    return whole if "architecture" in whole else {}
  with fields.problems_of("config.json"):
    return fields.mapping(whole, "pretrained_cfg")


def from_timm(part: Json, channels: int = 3) -> Preprocessing:
  """The pretrained_cfg of a config.json of timm.

  What it does not state is as in timm's `resolve_data_config`, which reads
  these six keys only.

  Raises:
    ConfigError: lists every value that cannot be followed.
  """
  problems = Problems("config.json: pretrained_cfg")
  stated = {key: value for key, value in part.items() if value}
  part = {
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "input_size": [channels, 224, 224],
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
    **stated,
  }
  values: dict[str, Any] = {"crop_rounding": "half_even"}
  for name in ("mean", "std"):
    with problems.collect():
      found = fields.numbers(part, name)
      values[name] = fields.per_channel(
        name, found, channels, positive=name == "std"
      )
  with problems.collect():
    values["image_size"] = fields.input_size(part, "input_size")[1:]
  with problems.collect():
    values["crop_fraction"] = fields.positive(part, "crop_pct")
  with problems.collect():
    modes = {"center": True, "squash": False}
    values["keep_aspect"] = fields.one_of(modes)(part, "crop_mode")
  with problems.collect():
    names = {name: name for name in INTERPOLATIONS}
    values["interpolation"] = fields.one_of(names)(part, "interpolation")
  return problems.build(Preprocessing, values)


def to_timm(value: Preprocessing) -> dict[str, Any]:
  """The part of pretrained_cfg that says how images are made.

  Raises:
    ValueError: it rounds where timm rounds half to even.
  """
  if value.crop_rounding != "half_even" and value.rounds:
    raise ValueError(
      "preprocessing: crop_rounding='floor' cannot be written in timm's layout,"
      " which rounds half to even; take 'half_even' if a shift of one pixel"
      " does not matter"
    )
  return {
    "input_size": [len(value.mean), *value.sides],
    "mean": list(value.mean),
    "std": list(value.std),
    "interpolation": value.interpolation,
    "crop_pct": value.crop_fraction,
    "crop_mode": "center" if value.keep_aspect else "squash",
  }
