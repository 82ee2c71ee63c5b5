"""Rotary positions of a published config.json.

Both spellings are read: `rope_theta` with `rope_scaling`, as published, and
`rope_parameters`, as `transformers` 5 writes.
"""

import math
from typing import Any

from tokjax.interop import fields
from tokjax.interop.fields import Json, Problems, Reader
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
    values |= scaling(rule, entries, part, problems)
  for place in (part, entries):
    if place.get("partial_rotary_factor") not in (None, 1):
      problems.found.append("partial_rotary_factor: only 1.0 is supported")
  return problems.build(Rotary, values)


def scaling(
  rule: str, entries: Json, part: Json, problems: Problems
) -> dict[str, Any]:
  """Arguments of `Rotary` for a scaling rule."""
  if rule == "none":
    return {}

  def read(ours: str, reader: Reader, name: str, where: Json = entries):
    with problems.collect():
      values[ours] = reader(where, name)

  values: dict[str, Any] = {"scaling": rule}
  original = "original_max_position_embeddings"
  longest, known = "max_position_embeddings", entries.get(original) is not None
  if rule in ("llama3", "yarn") and known:
    read("original_length", fields.integer, original)
  elif rule != "linear":
    read("original_length", fields.integer, longest, part)
  if rule != "yarn" or entries.get("factor") is not None:
    read("factor", fields.positive, "factor")
  elif "original_length" in values:
    with problems.collect():
      length = fields.integer(part, longest)
      values["factor"] = length / values["original_length"]
  if rule == "llama3":
    read("slow", fields.positive, "low_freq_factor")
    read("fast", fields.positive, "high_freq_factor")
  if rule == "yarn":
    read("slow", fields.optional(fields.positive, 1.0), "beta_slow")
    read("fast", fields.optional(fields.positive, 32.0), "beta_fast")
    read("truncate", fields.optional(fields.flag, True), "truncate")
    if "factor" in values:
      factor = values["factor"]
      values["attention_factor"] = attention_factor(entries, factor)
  return values


def attention_factor(entries: Json, factor: float) -> float | None:
  """YaRN's, which some configurations state through two `mscale`."""
  maybe = fields.optional(fields.positive)
  top, bottom = maybe(entries, "mscale"), maybe(entries, "mscale_all_dim")
  stated = maybe(entries, "attention_factor")
  if stated is None and top and bottom:
    of = lambda scale: 0.1 * scale * math.log(factor) + 1
    return of(top) / of(bottom)
  return stated
