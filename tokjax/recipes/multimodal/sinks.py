"""Visual attention sinks: attention is recycled, no token is removed."""

from tokjax.attention.redistribute import ToVisual
from tokjax.recipes.registry import recipe
from tokjax.slots import Slots


@recipe(
  "var",
  family="vlm",
  paper="See What You Are Told: Visual Attention Sink in Large Multimodal"
  " Models",
  arxiv="2503.03321",
  code="seilk/VisAttnSink",
  evidence="seilk/VisAttnSink:src/logic/logic.py, src/model/llava.py"
  " (98e62d6), its redistribution run next to this on the same attention",
  deviations="by default any dimension tells a sink (the official code has two"
  " of each model: give dims=); of several images all visual tokens count"
  " together, and queries stand behind the last; tokens that are generated are"
  " no sinks; every example has its own sinks",
)
def var(
  keep_sinks: float = 0.6,
  activation: float = 20.0,
  portion: float = 0.5,
  least: float = 0.2,
  dims: tuple[int, ...] | None = None,
  spared: tuple[int, int] = (2, 0),
) -> Slots:
  """Heads that look at the image take attention from sinks, for the others.

  Args:
    keep_sinks: what a sink keeps of its attention (p).
    activation: a token whose hidden state, normed to a root mean square of
      one, is beyond it in some dimension is a sink (tau).
    portion: heads give at most this part of their attention to the image to
      visual sinks (rho); others are left alone.
    least: and to the image at least this.
    dims: dimensions that tell sinks, (1415, 2533) of Llama 2 7B, (2100, 4743)
      of 13B; None: all.
    spared: how many first and last layers are left alone.
  """
  return Slots(
    attend=ToVisual(keep_sinks, activation, portion, least, dims, spared)
  )
