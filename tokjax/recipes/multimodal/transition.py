"""TransPrune: visual tokens that blocks hardly move leave."""

from jaxtyping import Array, Float

from tokjax.binding import bind
from tokjax.budgets import Stages
from tokjax.recipes.multimodal.pruning import VISUAL, followers
from tokjax.recipes.registry import recipe
from tokjax.reduce.reduction import Reduce
from tokjax.reduce.rules import KeepTop
from tokjax.reduce.site import Site
from tokjax.signals import Block, By, Derived, Rows, Transition
from tokjax.slots import Slots

BEHIND = By(Derived(Block(0), bind(followers, last=0)))
# Against a division by zero, as in the official code.
TINY = 1e-8


def moved_and_attended(
  site: Site, *, moved: Transition, attended: Rows
) -> Float[Array, "f"]:
  """The shares that each visual token has of both, added."""

  def share(x):
    x = x if site.mask is None else x * site.mask
    return x / (x.sum() + TINY)

  return share(site[moved]) + share(site[attended])


@recipe(
  "transprune",
  family="vlm",
  paper="TransPrune: Token Transition Pruning for Efficient Large"
  " Vision-Language Model",
  arxiv="2507.20630",
  code="liaolea/TransPrune",
  evidence="liaolea/TransPrune:llava/model/modeling_llama_transprune.py"
  " (c9e8284), its transitions and ranking run next to these on the same"
  " states",
  deviations="follows the code where the paper differs: turns are 1 - cosine,"
  " their softmax over all tokens (the paper: 1 - |cosine|, over visual ones);"
  " the softmax is within an example (there over the batch); heads of a group"
  " share their key head (the official ranking takes ungrouped heads only); at"
  " least one visual token stays",
)
def transprune(
  stages: tuple[tuple[int | float, float], ...] = (
    (0.21875, 0.875),
    (0.28125, 0.625),
    (0.375, 0.125),
  ),
  since: int | float = 0.1875,
) -> Slots:
  """Keeps visual tokens that sub-layers move, and that the text attends to.

  How far each sub-layer moves a token is summed from a first block on. The
  attention is that of all text behind the image, in the block whose input is
  reduced.

  Args:
    stages: pairs of a block, as a number or a fraction of the depth, and the
      fraction of the visual tokens that remain from it on.
    since: the first block that is summed over.
  """
  score = bind(
    moved_and_attended, moved=Transition(since=since),
    attended=Rows(of=BEHIND, over="mean"),
  )  # fmt: skip
  return Slots(
    Reduce(
      KeepTop(score), Stages(stages), free=VISUAL, position="renumber"
    )
  )
