"""Whether a model looks at the text more than at the other modality.

Metrics of "When Language Overrules: Revealing Text Dominance in Multimodal
Large Language Models" (arXiv 2508.10552), from its abstract and public
reimplementations; its code was not found. Attention is that of generated tokens
to the prompt, mean over heads, which a model collects:

    asked = Rows(of=Last(count), over="mean")
    model = VisionLanguage(config, Slots(collect=(asked,)))
    _, out = model.apply({"params": params}, prompts)   # with what followed
    maps = [answers.values[0] for answers in out["signals"]]

The paper compresses images as FasterVLM does (`fastervlm`) and measures again,
with the tokens that are left.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Dominance(NamedTuple):
  """How attention divides between text and the other modality.

  Attributes:
    index: attention to a text token over that to another one, on average (MDI):
      above 1 the text dominates, `[*b]`.
    text, other: the part of attention that a modality has over the part of
      tokens that it has (AEI), `[*b]`; `index` is their quotient.
  """

  index: Float[Array, "*b"]
  text: Float[Array, "*b"]
  other: Float[Array, "*b"]


def dominance(
  attention: Float[Array, "*b n"],
  text: Bool[Array, "*c n"],
  other: Bool[Array, "*c n"],
) -> Dominance:
  """The metrics of rows of attention.

  Args:
    attention: of one or the mean of several generated tokens; what goes to
      tokens of neither modality does not count.
    text: which tokens of the prompt are text; none of padding. The same for
      every leading axis that `attention` has and this has not.
    other: which are of the other modality.

  Returns:
    NaN where a modality has no tokens or receives nothing.
  """
  text, other = (jnp.broadcast_to(x, attention.shape) for x in (text, other))
  of = lambda which: jnp.where(which, attention, 0.0).sum(axis=-1)
  count = lambda which: which.sum(axis=-1)
  share = of(text) / (of(text) + of(other))
  tokens = count(text) / (count(text) + count(other))
  mine, theirs = share / tokens, (1 - share) / (1 - tokens)
  return Dominance(mine / theirs, mine, theirs)


def by_depth(
  values: Float[Array, "layers *b"], each: int = 2
) -> dict[str, Float[Array, "*b"]]:
  """Means over the first, the middle and the last layers.

  Args:
    values: of each layer.
    each: layers of a group, as many as public reimplementations take.

  Raises:
    ValueError: there are fewer layers than a group has.
  """
  depth = len(values)
  if not 1 <= each <= depth:
    raise ValueError(f"each={each}: must be in 1..{depth}, the layers")
  middle = (depth - each) // 2
  starts = {"early": 0, "middle": middle, "late": depth - each}
  return {n: values[at : at + each].mean(axis=0) for n, at in starts.items()}
