"""Actions of robots as token ids, in bins of equal width (RT-2, OpenVLA).

The last ids of a vocabulary stand for bins of [-1, 1], the last but `bins` for
the largest values; statistics of a data set scale them. Read from
prismatic/extern/hf/modeling_prismatic.py and prismatic/vla/action_tokenizer.py
of openvla/openvla (c8f03f4).
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from tokjax.interop import fields, files
from tokjax.interop.fields import Json, Problems


@dataclasses.dataclass(frozen=True)
class Scale:
  """Of the actions of one data set, one number for each dimension.

  Attributes:
    low, high: what -1 and 1 stand for.
    scaled: False for dimensions that stay in [-1, 1] (a gripper).
  """

  low: tuple[float, ...]
  high: tuple[float, ...]
  scaled: tuple[bool, ...]

  def __post_init__(self):
    if not len(self.low) == len(self.high) == len(self.scaled) > 0:
      raise ValueError(
        f"q01, q99, mask: have {len(self.low)}, {len(self.high)} and"
        f" {len(self.scaled)} entries; must be one for each dimension"
      )


@dataclasses.dataclass(frozen=True)
class Actions:
  """Token ids to actions and back.

  Attributes:
    vocabulary: ids of the tokenizer; embeddings may have more rows.
    bins: edges of bins; there is one bin less.
    scales: of each data set, by its name.
  """

  vocabulary: int
  bins: int
  scales: tuple[tuple[str, Scale], ...]

  def scale(self, dataset: str | None = None) -> Scale:
    """The scale of a data set; None: that of the only one.

    Raises:
      ValueError: no such data set, or several and none is named.
    """
    known = dict(self.scales)
    if dataset is None and len(known) == 1:
      return self.scales[0][1]
    if dataset not in known:
      raise ValueError(
        f"dataset={dataset!r}: must be one of {sorted(known)}, whose actions"
        " the model was trained on"
      )
    return known[dataset]

  def dimensions(self, dataset: str | None = None) -> int:
    """Numbers of an action, each of which is a token."""
    return len(self.scale(dataset).low)

  def decode(
    self, ids: Int[np.ndarray, "*b a"] | Sequence[int],
    dataset: str | None = None,
  ) -> Float[np.ndarray, "*b a"]:
    """Actions of tokens.

    Args:
      ids: as many as an action has dimensions; one that is no bin counts as
        the nearest that is, as in the reference.
      dataset: whose scale is used.

    Raises:
      ValueError: another number of ids.
    """  # fmt: skip
    scale, ids = self.scale(dataset), np.asarray(ids)
    if ids.shape[-1:] != (len(scale.low),):
      raise ValueError(
        f"ids: have shape {ids.shape}; an action has {len(scale.low)}"
        " dimensions, the last axis"
      )
    edges = np.linspace(-1, 1, self.bins)
    centres = (edges[:-1] + edges[1:]) / 2
    bin_ = np.clip(self.vocabulary - ids - 1, 0, len(centres) - 1)
    low, high = np.asarray(scale.low), np.asarray(scale.high)
    plain = centres[bin_]
    return np.where(scale.scaled, (plain + 1) / 2 * (high - low) + low, plain)

  def encode(
    self, values: Float[np.ndarray, "*b a"], dataset: str | None = None
  ) -> Int[np.ndarray, "*b a"]:
    """Tokens of actions; values beyond the scale count as its ends."""
    scale = self.scale(dataset)
    low, high = np.asarray(scale.low), np.asarray(scale.high)
    wide = np.where(high > low, high - low, 1.0)
    plain = np.where(scale.scaled, (values - low) / wide * 2 - 1, values)
    edges = np.linspace(-1, 1, self.bins)
    return self.vocabulary - np.digitize(np.clip(plain, -1, 1), edges)


def read(whole: Json) -> Actions:
  """What a config.json says of actions.

  Raises:
    ConfigError: lists every fault.
  """
  problems, scales, sizes = Problems("config.json"), [], {}
  with problems.collect():
    bins = fields.optional(fields.integer, 256)(whole, "n_action_bins")
    if bins < 2:
      raise fields.wrong("n_action_bins", bins, "2 or more")
    text = {"vocab_size": 32_000, **fields.mapping(whole, "text_config")}
    rows = fields.integer(text, "vocab_size")
    more = fields.optional(fields.natural, 64)(whole, "pad_to_multiple_of")
    if rows - more < bins:
      raise fields.wrong("vocab_size", rows, f"{bins + more} or more")
    sizes = {"vocabulary": rows - more, "bins": bins}
  with problems.collect():
    stated = fields.mapping(whole, "norm_stats")
    if not stated:
      raise ValueError("norm_stats: has no data set, so actions have no scale")
    for name in stated:
      with problems.collect():
        scales.append((name, scale_of(stated, name)))
  return problems.build(Actions, {**sizes, "scales": tuple(scales)})


def scale_of(stated: Json, name: str) -> Scale:
  """The scale of a data set: between its 1st and its 99th percentile."""
  try:
    part = fields.mapping(fields.mapping(stated, name), "action")
    low, high = fields.numbers(part, "q01"), fields.numbers(part, "q99")
    mask = part.get("mask", [True] * len(low))
    if not isinstance(mask, list) or not all(isinstance(x, bool) for x in mask):
      raise fields.wrong("mask", mask, "a list of true and false")
    return Scale(low, high, tuple(mask))
  except ValueError as error:
    raise ValueError(f"norm_stats.{name}.action: {error}") from error


def of_folder(folder: pathlib.Path) -> Actions:
  """The actions of a checkpoint."""
  return read(files.read_json(folder / "config.json"))
