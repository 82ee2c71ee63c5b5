"""Dense attention, corrected: less for sinks, more for others, or gated."""

from typing import Literal

from tokjax.attention.recalibrate import Calibrated, FirstToken, Gated
from tokjax.recipes.registry import recipe
from tokjax.slots import Slots


@recipe(
  "act",
  family="llm",
  paper="Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large"
  " Language Models without Training through Attention Calibration",
  arxiv="2406.15765",
  code="GATECH-EIC/ACT",
  evidence="GATECH-EIC/ACT:models/llama_modelling_aug.py, scripts/ (a267af7)",
  deviations="while decoding, the sinks of the prompt are used; the official"
  " code works on whole sequences only",
)
def act(
  keep_sinks: float = 0.4,
  threshold: float = 0.1,
  heads: tuple | None = None,
  spared: tuple[int, int] = (2, 1),
) -> Slots:
  """Takes attention from sinks after the first and spreads it over others.

  Args:
    keep_sinks: what a sink keeps of its attention (beta).
    threshold: mean attention above which a token is a sink (alpha).
    heads: query heads that are changed, for all layers or a tuple for each;
      None: all.
    spared: how many first and last layers are left alone.
  """
  return Slots(attend=Calibrated(keep_sinks, threshold, heads, spared))


@recipe(
  "zerotuning",
  family="llm",
  paper="ZeroTuning: Unlocking the Initial Token's Power to Enhance Large"
  " Language Models Without Training",
  arxiv="2505.11739",
  evidence="weak: the paper's text; its code is anonymous",
)
def zerotuning(
  gamma: float = 1.2,
  heads: tuple | None = None,
  layers_tuned: tuple[int, ...] | None = None,
) -> Slots:
  """Scales attention to the first token; gamma is searched on examples.

  Args:
    gamma: factor on the attention to the first token, above 0.
    heads: query heads that are tuned, for all layers or a tuple for each;
      None: all.
    layers_tuned: layers that are tuned; None: all.
  """
  return Slots(attend=FirstToken(gamma, heads, layers_tuned))


@recipe(
  "gated_attention",
  family="llm",
  paper="Gated Attention for Large Language Models: Non-linearity, Sparsity,"
  " and Attention-Sink-Free",
  arxiv="2505.06708",
  code="qiuzh20/gated_attention",
  training="learned",
  evidence="qiuzh20/gated_attention:modeling_qwen3.py (49645df)",
)
def gated_attention(
  kind: Literal["headwise", "elementwise"] = "elementwise",
  with_bias: bool = False,
) -> Slots:
  """A sigmoid gate of the layer's input on the outputs of all heads.

  Args:
    kind: one gate a query head, or one a channel.
    with_bias: whether the gate's projection has a bias.
  """
  return Slots(attend=Gated(kind=kind, with_bias=with_bias))
