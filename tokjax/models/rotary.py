"""Rotary positions: frequencies by published scaling rule, and the rotation.

Pairs are (i, i + k/2) of a head's k features (the layout of Llama, Mistral,
Qwen and Gemma). Angles, cosines and sines are float32, whatever the dtype of
what is rotated.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.layer import Position

SCALINGS = ("none", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rotary:
  """How positions turn queries and keys.

  Rules were checked against `transformers` 5.24, modeling_rope_utils.py.

  Attributes:
    base: wavelengths grow from 2 pi to 2 pi * base along the features.
    scaling: "none"; "linear" divides every frequency by `factor` (position
      interpolation); "dynamic" grows the base once a sequence is longer than
      `original_length` (NTK); "llama3" divides long wavelengths only; "yarn"
      divides those that turn less than `slow` times within the original
      length, keeps those that turn more than `fast` times, and scales
      attention.
    factor: how many times longer the context has become.
    original_length: the context before scaling, in tokens.
    slow, fast: bounds in turns within the original length, between which
      "llama3" and "yarn" interpolate (Llama 3.1: 1 and 4, YaRN: 1 and 32).
    attention_factor: "yarn": cosines and sines are multiplied by it; None:
      0.1 log(factor) + 1.
    truncate: "yarn": bounds are rounded outwards to whole features.
    sections: positions of several axes (time, row and column in Qwen2-VL): how
      many pairs of features turn by each axis, in order; (): positions have one
      axis, which turns all. Where the axes agree both are the same.
  """

  base: float = 10_000.0
  scaling: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
  factor: float = 1.0
  original_length: int = 0
  slow: float = 1.0
  fast: float = 4.0
  attention_factor: float | None = None
  truncate: bool = True
  sections: tuple[int, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, "sections", tuple(self.sections))
    if not all(isinstance(n, int) and n > 0 for n in self.sections):
      raise ValueError(
        f"sections={self.sections}: must be integers of 1 or more, pairs of"
        " features for each axis"
      )
    if self.sections and self.scaling == "dynamic":
      raise ValueError(
        "scaling='dynamic': changes with the length of a text, which positions"
        f" of {len(self.sections)} axes do not tell; use another scaling"
      )
    if self.scaling not in SCALINGS:
      raise ValueError(
        f"scaling={self.scaling!r}: must be one of {', '.join(SCALINGS)}"
      )
    if not (1 < self.base < math.inf and 1 <= self.factor < math.inf):
      raise ValueError(
        f"base={self.base}, factor={self.factor}: the base must be above 1 and"
        " the factor 1 or more, both finite"
      )
    if self.scaling not in ("none", "linear") and self.original_length < 1:
      raise ValueError(
        f"scaling={self.scaling!r}: needs original_length, the context before"
        " scaling"
      )
    # "llama3" divides by the distance of the two.
    apart = self.slow < self.fast or (self.scaling == "yarn" and self.slow)
    bounds = 0 < self.slow <= self.fast < math.inf and apart
    if self.scaling in ("llama3", "yarn") and not bounds:
      raise ValueError(
        f"slow={self.slow}, fast={self.fast}: both must be finite and above 0,"
        " slow below fast"
      )
    factor = self.attention_factor
    if factor is not None and not 0 < factor < math.inf:
      raise ValueError(
        f"attention_factor={factor}: must be a finite number above 0"
      )

  @property
  def scale(self) -> float:
    """What cosines and sines are multiplied by."""
    if self.scaling != "yarn":
      return 1.0
    if self.attention_factor is not None:
      return self.attention_factor
    return 0.1 * math.log(self.factor) + 1

  def frequencies(
    self, features: int, length: Int[Array, "*b"] | None = None
  ) -> Float[Array, "*b half"]:
    """Radians per position of every pair, float32.

    Args:
      features: of a head.
      length: "dynamic" only: how long each sequence is now (may be traced);
        None: no longer than the original.
    """
    if self.scaling == "dynamic":
      return self._dynamic(features, length)
    return jnp.asarray(self._fixed(features))

  def _fixed(self, features: int) -> np.ndarray:
    """Frequencies that do not change with the length of a text."""
    plain = 1.0 / np.float32(self.base) ** _exponent(features)
    rule = {
      "none": lambda: plain,
      "linear": lambda: plain / self.factor,
      "llama3": lambda: self._llama3(plain),
      "yarn": lambda: self._yarn(plain, features),
    }[self.scaling]
    return rule().astype(np.float32)

  def _dynamic(self, features, length):
    exponent = _exponent(features)
    length = jnp.asarray(self.original_length if length is None else length)
    longer = jnp.maximum(length, self.original_length) / self.original_length
    growth = self.factor * longer - (self.factor - 1)
    base = self.base * growth ** (features / (features - 2))
    exponent = jnp.asarray(exponent)[(None,) * length.ndim]
    return (1.0 / base[..., None] ** exponent).astype(jnp.float32)

  def _llama3(self, plain):
    turns = self.original_length * plain / (2 * np.pi)
    keep = (turns - self.slow) / (self.fast - self.slow)
    keep = np.clip(keep, 0, 1)
    return keep * plain + (1 - keep) * plain / self.factor

  def _yarn(self, plain, features):
    def feature(turns):
      """The pair, as a real number, that turns so often."""
      ratio = self.original_length / (turns * 2 * math.pi)
      return features * math.log(ratio) / (2 * math.log(self.base))

    low, high = feature(self.fast), feature(self.slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, features - 1)
    high = high + 0.001 if low == high else high
    ramp = (np.arange(features // 2, dtype=np.float32) - low) / (high - low)
    keep = 1 - np.clip(ramp, 0, 1)
    return keep * plain + (1 - keep) * plain / self.factor

  def __call__(
    self, x: Float[Array, "*b t h d"], position: Position
  ) -> Float[Array, "*b t h d"]:
    """Queries or keys turned by their positions, in the dtype of `x`.

    "dynamic" takes the largest position of a sequence for its length. Turning
    by `a` and then by `b` is turning by `a + b`, except that a `scale` other
    than 1 is applied twice.

    Args:
      x: queries or keys.
      position: of tokens; see `tables`.
    """
    return _turned(x, *self.tables(x.shape[-1], position)).astype(x.dtype)

  def tables(
    self, features: int, position: Position
  ) -> tuple[Float[Array, "*b t d"], Float[Array, "*b t d"]]:
    """Cosines and sines `[*b, t, d]`, of which the first halves are negative.

    `x` turned is `x * cosine + roll(x, d / 2) * sine`.

    Args:
      features: d, of a head.
      position: of tokens. Of NumPy's positions the tables are constants of a
        compiled program, except for "dynamic". Where many keys are turned to
        places that never change, XLA for CPUs would compute sines anew for each
        head and feature.
    """
    if self.scaling != "dynamic" and isinstance(position, np.ndarray):
      places = position.astype(np.float32)
      return _constant(self, features, places.shape, places.tobytes())
    if self.scaling == "dynamic":
      length = jnp.asarray(position).max(axis=-1) + 1
      frequency = self.frequencies(features, length)[..., None, :]
    else:
      frequency = self._fixed(features)[(None,) * position.ndim]
    angle = position.astype(jnp.float32)[..., None] * frequency
    cosine, sine = _tables(angle, jnp)
    return cosine * self.scale, sine * self.scale

  def by_axis(
    self, x: Float[Array, "*b t h d"], offset: Int[Array, "*b t a"]
  ) -> Float[Array, "*b t h d"]:
    """Queries or keys turned on by other positions on each axis.

    `self(self.by_axis(x, offset), position)` is `x` at the coordinates
    `position + offset`. So attention and caches go on with one position, which
    orders tokens, and never ask how many axes there are.

    Args:
      x: queries or keys.
      offset: of the axes of `sections`, from the position that orders tokens.
    """
    axis = np.repeat(np.arange(len(self.sections)), self.sections)
    frequency = self.frequencies(x.shape[-1])[(None,) * (offset.ndim - 1)]
    angle = offset.astype(jnp.float32)[..., axis] * frequency
    return turned(x, angle).astype(x.dtype)


def _exponent(features: int) -> np.ndarray:
  return np.arange(0, features, 2, dtype=np.float32) / features


def turned(
  x: Float[Array, "*b t h d"], angle: Float[Array, "*b t half"]
) -> Float[Array, "*b t h d"]:
  """Every pair of features turned by its angle, float32."""
  return _turned(x, *_tables(angle, jnp))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _constant(rotary: Rotary, features: int, shape: tuple, places: bytes):
  """`Rotary.tables` of known float32 positions.

  A function of its own: a program holds its constants once, however many layers
  call it.
  """
  position = np.frombuffer(places, np.float32).reshape(shape)
  frequency = rotary._fixed(features)
  tables = _tables(position[..., None] * frequency, np)
  return tuple(jnp.asarray(x * np.float32(rotary.scale)) for x in tables)


def _tables(angle, by):
  """Cosines and sines by NumPy or `jax.numpy`; see `Rotary.tables`."""
  cosine, sine = by.cos(angle), by.sin(angle)
  return (
    by.concatenate([cosine, cosine], axis=-1),
    by.concatenate([-sine, sine], axis=-1),
  )


def _turned(x, cosine, sine):
  x, half = x.astype(jnp.float32), x.shape[-1] // 2
  # Joining two turned halves takes XLA for CPUs four times as long.
  rolled = jnp.roll(x, half, axis=-1)
  return x * cosine[..., None, :] + rolled * sine[..., None, :]
