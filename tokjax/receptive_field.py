"""LongMamba: which tokens a state-space model skips in long texts.

The state of a Mamba layer forgets by a factor exp(delta * rate) at each token,
less than 1, and takes in the token in proportion to delta. Heads that hardly
forget over a text of the length that the model was trained with see all of it;
in a longer text the sum of their deltas grows, and they forget what they never
had to. For those heads LongMamba sets small deltas to zero, so that the sum
remains about what it was: such a token is neither taken in nor does it make the
state forget. Nothing is trained; thresholds come from a few texts.

Ye et al., 2025; checked against GATECH-EIC/LongMamba:load_align_target.py,
mamba_ssm/modules/mamba2.py (5da3e17), whose rule was run next to this on the
same arrays. Deviations: any length above that of calibration is filtered (there
those from 3000 tokens on, whatever the length of calibration); a threshold that
would lie behind the last delta is the last one (an error there).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Calibration(NamedTuple):
  """What is known of the heads of one layer.

  Attributes:
    retained: what remains of the state over a text of calibration, in 0..1,
      `[h]`.
    lengths: of texts for which there are thresholds, ascending, `[l]`.
    threshold: of deltas at those lengths, `[l, h]`.
    trained: length of the texts of calibration, `[]`.
  """

  retained: Float[Array, "h"]
  lengths: Int[Array, "l"]
  threshold: Float[Array, "l h"]
  trained: Int[Array, ""]


def clipped(delta: Float[Array, "t h"], share: float) -> Float[Array, "t h"]:
  """Deltas that are no larger than those at the end of the top `share`.

  Raises:
    ValueError: `share` is not in (0, 1].
  """
  if not 0 < share <= 1:
    raise ValueError(f"share={share}: must lie in (0, 1]")
  top = max(1, int(len(delta) * share))
  return jnp.minimum(delta, jnp.sort(delta, axis=0)[-top][None])


def retained(
  delta: Float[Array, "t h"], rate: Float[Array, "h"]
) -> Float[Array, "h"]:
  """The factor of a state over all tokens; `rate` is negative."""
  return jnp.exp((delta * rate[None]).sum(axis=0))


def threshold(delta: Float[Array, "t h"], length: int) -> Float[Array, "h"]:
  """Above which deltas of a text of `length` tokens sum to those of this one.

  The sorted deltas are stretched to `length` by linear interpolation.

  Raises:
    ValueError: `length` is below 1.
  """
  if length < 1:
    raise ValueError(f"length={length}: must be 1 or more")
  t, h = delta.shape
  if length <= t:
    return jnp.zeros(h, delta.dtype)
  ordered = jnp.sort(delta, axis=0, descending=True)
  at = jnp.clip((jnp.arange(length) + 0.5) * t / length - 0.5, 0, t - 1)
  low = jnp.floor(at).astype(jnp.int32)
  part = (at - low)[:, None]
  high = jnp.minimum(low + 1, t - 1)
  long = ordered[low] * (1 - part) + ordered[high] * part
  over = jnp.cumsum(long, axis=0) > delta.sum(axis=0)[None]
  index = jnp.minimum(jnp.argmax(over, axis=0) + 1, length - 1)
  return jnp.take_along_axis(long, index[None], axis=0)[0]


def calibrate(
  delta: Float[Array, "s t h"],
  rate: Float[Array, "h"],
  lengths: tuple[int, ...],
  *,
  share: float = 0.1,
) -> Calibration:
  """Means over texts of one layer's deltas.

  Args:
    delta: of the tokens of `s` texts, as long as those of training.
    rate: of decay of each head, negative.
    lengths: of texts to find thresholds for, ascending.
    share: the largest deltas of each head and text that are cut to the smallest
      of them first: 0.1, 0.15 or 0.2 as published.

  Raises:
    ValueError: `share` is not in (0, 1], or lengths are missing, below 1 or
      not ascending.
  """
  if not lengths or list(lengths) != sorted(set(lengths)):
    raise ValueError(f"lengths={lengths}: must be ascending, one or more")
  cut = jax.vmap(lambda x: clipped(x, share))(delta)
  mean = lambda of: jax.vmap(of)(cut).mean(axis=0)
  return Calibration(
    mean(lambda x: retained(x, rate)),
    jnp.asarray(lengths, jnp.int32),
    jnp.stack([mean(lambda x, n=n: threshold(x, n)) for n in lengths]),
    jnp.int32(delta.shape[1]),
  )


def filtered(
  delta: Float[Array, "n h"],
  length: Int[Array, ""],
  calibration: Calibration,
  *,
  least: float | Float[Array, ""],
  factor: float | Float[Array, ""] = 1.0,
) -> Float[Array, "n h"]:
  """Deltas of a text with zeros for the tokens that heads skip.

  Args:
    delta: of its tokens.
    length: how many of them are real; it chooses the nearest of the tabulated
      lengths.
    calibration: of the layer.
    least: heads that retain more than this are filtered. It depends on the
      model; 1 filters none.
    factor: on thresholds.
  """
  c = calibration
  nearest = jnp.argmin(jnp.abs(c.lengths - length))
  keep = delta > factor * c.threshold[nearest][None]
  wide = (c.retained > least)[None] & (length > c.trained)
  return jnp.where(wide & ~keep, 0.0, delta)
