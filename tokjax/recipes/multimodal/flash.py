"""FLASH: a draft that sees a compressed image and guesses several tokens."""

from tokjax import learned, losses
from tokjax.recipes.registry import recipe
from tokjax.slots import Slots


@recipe(
  "flash",
  family="vlm",
  paper="FLASH: Latent-Aware Semi-Autoregressive Speculative Decoding for"
  " Multimodal Tasks",
  arxiv="2505.12728",
  code="ZihuaEvan/FlashSD",
  training="learned",
  evidence="ZihuaEvan/FlashSD:flash/model/llama_sar.py, flash/train/"
  "train_sar.py (598e999), its draft layer and its losses run next to these;"
  " the compression is as its text says, since the release names what it does"
  " not define",
  deviations="one sequence of guesses is checked (there a tree, of which the"
  " release has the code of another draft only); guesses beyond the end of a"
  " text do not count in the losses (there the target of a constant); all text"
  " behind the first image counts (there the answers); all images of a prompt"
  " are pooled together, and newlines are left out; where a prompt has several,"
  " a text token in front of one is joined with the next text token; gradients"
  " are clipped as the config says (there by value)",
)
def flash(
  latents: int | None = 64,
  ahead: int = 5,
  groups: int = 4,
  noise: float = 0.2,
  tokens: float = 0.1,
) -> Slots:
  """A small layer guesses tokens, which the model checks at once.

  Nothing is removed from the prompt of the model, whose text stays the same;
  `tokjax.models.Speculative` makes it. Training leaves the model as it is.

  Args:
    latents: what the visual tokens are pooled to for the draft; None: it sees
      all of them.
    ahead: tokens that are guessed at once.
    groups: key heads of the draft.
    noise: of the features that it reads in training.
    tokens: what the cross entropy of tokens counts next to the features.
  """
  for name, value in (
    ("latents", 1 if latents is None else latents), ("ahead", ahead),
    ("groups", groups),
  ):  # fmt: skip
    if value < 1:
      raise ValueError(f"{name}={value}: must be 1 or more")
  if noise < 0 or tokens < 0:
    raise ValueError(f"noise={noise}, tokens={tokens}: must be 0 or more")
  return Slots(
    draft=learned.LatentDraft(latents, ahead, groups, noise),
    losses=(losses.Drafting(tokens=tokens),),
  )
