"""Rotary positions of a published config.json.

Both spellings are read: `rope_theta` with `rope_scaling`, as published, and
`rope_parameters`, as `transformers` 5 writes. The first is written; all
versions of `transformers` read it.
"""

import dataclasses
import math
from typing import Any

from tokjax.interop import fields
from tokjax.interop.fields import Field, Json, Problems
from tokjax.models.rotary import Rotary

# Their names of the rules of `Rotary`.
SCALINGS = {
  "default": "none",
  "linear": "linear",
  "dynamic": "dynamic",
  "llama3": "llama3",
  "yarn": "yarn",
}


def rope_entries(part: Json, layer_type: str) -> Json:
  """The entries that say how positions are rotated, in either spelling."""
  entries = fields.mapping(part, "rope_parameters")
  entries = fields.mapping(entries, layer_type) or entries
  if layer_type == "sliding_attention" and not entries:
    # Gemma 3 as published: local layers have a base and no scaling.
    return {"rope_theta": part["rope_local_base_freq"]}
  published = {"rope_theta": part["rope_theta"]}
  return {**published, **fields.mapping(part, "rope_scaling"), **entries}


ORIGINAL = "original_max_position_embeddings"
LONGEST = "max_position_embeddings"


def original_length(part: Json, name: str) -> int:
  """Absent: the longest context is the original one."""
  known = part.get(name) is not None
  return fields.integer(part, name if known else LONGEST)


def yarn_factor(part: Json, name: str) -> float:
  """Absent: the longest context over the original one."""
  if part.get(name) is not None:
    return fields.positive(part, name)
  return fields.integer(part, LONGEST) / original_length(part, ORIGINAL)


def attention_factor(part: Json, name: str) -> float | None:
  """YaRN's, which some configurations state through two `mscale`."""
  maybe = fields.optional(fields.positive)
  top, bottom = maybe(part, "mscale"), maybe(part, "mscale_all_dim")
  stated = maybe(part, name)
  if stated is None and top and bottom:
    factor = yarn_factor(part, "factor")
    of = lambda scale: 0.1 * scale * math.log(factor) + 1
    return of(top) / of(bottom)
  return stated


# Of transformers 5.24, where config.json is silent.
DEFAULT_SECTIONS = (16, 24, 24)
FACTOR = Field("factor", "factor", fields.positive)
LENGTH = Field("original_length", ORIGINAL, original_length)
# The numbers of each rule.
NUMBERS: dict[str, tuple[Field, ...]] = {
  "none": (),
  "linear": (FACTOR,),
  # The original length is that of the model, whose key says it.
  "dynamic": (
    FACTOR, Field("original_length", LONGEST, fields.integer, None),
  ),
  "llama3": (
    LENGTH,
    FACTOR,
    Field("slow", "low_freq_factor", fields.positive),
    Field("fast", "high_freq_factor", fields.positive),
  ),
  "yarn": (
    LENGTH,
    Field("factor", "factor", yarn_factor),
    Field("slow", "beta_slow", fields.optional(fields.positive, 1.0)),
    Field("fast", "beta_fast", fields.optional(fields.positive, 32.0)),
    Field("truncate", "truncate", fields.optional(fields.flag, True)),
    Field("attention_factor", "attention_factor", attention_factor),
  ),
}  # fmt: skip


def rotary(part: Json, layer_type: str = "full_attention") -> Rotary:
  """The positions of one kind of layer.

  Raises:
    ConfigError: a scaling rule that `Rotary` does not have, or its numbers.
  """
  entries, problems = rope_entries(part, layer_type), Problems(layer_type)
  values: dict[str, Any] = {}
  with problems.collect():
    values["base"] = fields.positive(entries, "rope_theta")
  with problems.collect():
    key = "rope_type" if "rope_type" in entries else "type"
    rule = fields.optional(fields.one_of(SCALINGS), "none")(entries, key)
    if LONGEST in part:
      entries = {**entries, LONGEST: part[LONGEST]}
    values["scaling"] = rule
    values |= fields.read_fields(NUMBERS[rule], entries, problems)
  for place in (part, entries):
    if place.get("partial_rotary_factor") not in (None, 1):
      problems.found.append("partial_rotary_factor: only 1.0 is supported")
  return problems.build(Rotary, values)


def multi_axis(part: Json) -> Rotary:
  """Positions of several axes (Qwen2-VL); the type "mrope" is "default".

  Raises:
    ConfigError: as `rotary`.
  """
  entries = dict(rope_entries(part, "full_attention"))
  sections = entries.pop("mrope_section", DEFAULT_SECTIONS)
  if not isinstance(sections, list | tuple) or not all(
    fields.is_integer(n) and n > 0 for n in sections
  ):
    raise fields.wrong("mrope_section", sections, "a list of integers above 0")
  if entries.get("mrope_interleaved"):
    raise ValueError("mrope_interleaved=True is not supported")
  kind = entries.get("rope_type", entries.pop("type", None))
  entries["rope_type"] = "default" if kind == "mrope" else kind
  plain = rotary({**part, "rope_scaling": None, "rope_parameters": entries})
  return dataclasses.replace(plain, sections=tuple(sections))


def scaling_of(rotary: Rotary) -> dict[str, Any] | None:
  """`rope_scaling` of positions; None where they are not scaled."""
  if rotary.scaling == "none":
    return None
  names = {ours: theirs for theirs, ours in SCALINGS.items()}
  entries: dict[str, Any] = {"rope_type": names[rotary.scaling]}
  for field in NUMBERS[rotary.scaling]:
    written = field.written(rotary).items()
    entries |= {key: value for key, value in written if value is not None}
  return entries
