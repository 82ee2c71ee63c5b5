"""Vision-language models next to those of `transformers`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.interop.language_references import torch
from tokjax.models import VisionLanguageGenerator

# The requirement is 1e-4.
BOUND = 2e-5


def photos(sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
  """Random images."""
  rng = np.random.default_rng(4)
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def answers(
  made: VisionLanguageGenerator, prompts, images, following: np.ndarray
) -> np.ndarray:
  """Logits behind prompts, and behind each of the tokens `[steps, b]` fed."""
  going = made.prefill(prompts, images)
  found = [np.asarray(going.logits)]
  for token in following:
    going = made.step(going, token.astype(np.int32))
    found.append(np.asarray(going.logits))
  return np.stack(found, axis=1)


def their_logits(model, ids, following, given: dict[str, Any]) -> np.ndarray:
  """Of the last token of a prompt and of the tokens that follow."""
  whole = torch.tensor([[*ids, *following]])
  with torch.no_grad():
    logits = model(input_ids=whole, **given).logits[0]
  return logits[len(ids) - 1 :].numpy()


def assert_equal(
  theirs: Any,
  made: VisionLanguageGenerator,
  prompts: Sequence[Sequence[int]],
  images: Sequence[Sequence[Any]],
  following: np.ndarray,
  given_of: Callable[[Sequence[int], Sequence[Any]], dict[str, Any]],
  record_property: Callable[[str, float], None],
) -> None:
  """A ragged batch equals the reference, prompt by prompt.

  Args:
    theirs, made: both models.
    prompts, images: see `VisionLanguageGenerator`.
    following: tokens that are fed, `[steps, b]`.
    given_of: what else the reference is called with, from the ids that it is
      given and the images of the prompt.
    record_property: is told the largest difference.
  """
  packed, _ = made.pack(prompts, images)
  found = answers(made, prompts, images, following)
  for i, own in enumerate(images):
    ids, after = packed.tokens[i, : packed.length[i]].tolist(), following[:, i]
    given = given_of([*ids, *after], own)
    expected = their_logits(theirs, ids, after, given)
    assert np.abs(expected).max() > 0.5
    worst = np.abs(found[i] - expected).max()
    record_property("max_abs_difference", float(worst))
    assert worst < BOUND, i
