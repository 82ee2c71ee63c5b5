"""Frames share out what remains, evenly or by what they show; ragged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.multimodal import vlm_models
from tests.multimodal.vlm_models import IMAGE
from tokjax import recipes
from tokjax.recipes.multimodal.by_frame import OfFrames, by_frame
from tokjax.reduce.rules import KeepTop
from tokjax.reduce.site import Site
from tokjax.signals import Answers, Origin
from tokjax.tokens import Kind, Tokens

SCORE = np.array([9, 8, 7, 6, 1, 2, 3, 4, 5, 0, 0.5, 0.25], np.float32)
FRAME = np.repeat([0, 1, 2], [4, 5, 3])


def first_feature(site):
  return site.x[:, 0]


def kept(even, due, real=12):
  """Tokens that stay of three frames of 4, 5 and 3 tokens."""
  origin = np.zeros((12, 8), np.int32)
  origin[:, 0] = FRAME
  mask = np.arange(12) < real
  tokens = Tokens.create(jnp.asarray(SCORE)[:, None], mask=jnp.asarray(mask))
  asked = Origin().answered(Origin().at(0, 1))
  answers = Answers().add(asked, jnp.asarray(origin))
  site = Site(tokens, answers, 6, due=jnp.asarray(due))
  plan = KeepTop(OfFrames(first_feature, even))(site)
  return np.asarray(plan.anchor)[np.asarray(plan.valid)].tolist()


def slow(even, due, real=12):
  """Each frame its share, by cumulated sizes; then the best of all."""
  sizes = [sum(f == k for f in FRAME[:real]) for k in range(3)]
  chosen, upto = [], 0
  for k, size in enumerate(sizes):
    share = due * (upto + size) // real - due * upto // real
    own = [i for i in range(real) if FRAME[i] == k]
    chosen += sorted(own, key=lambda i: -SCORE[i])[: int(even * share + 1e-9)]
    upto += size
  rest = sorted(set(range(real)) - set(chosen), key=lambda i: -SCORE[i])
  return sorted(chosen + rest[: due - len(chosen)])


@pytest.mark.parametrize(
  ("even", "due", "real"), [(1.0, 6, 12), (0.5, 6, 12), (1e-6, 6, 12),
  (1.0, 4, 9), (0.5, 3, 4)],
)  # fmt: skip
def test_frames_keep_their_share_and_the_best_the_rest(even, due, real):
  found = kept(even, due, real)
  assert found == slow(even, due, real)
  if even < 1e-3:
    assert found == sorted(np.argsort(-SCORE[:real])[:due].tolist())


def test_prompts_of_two_and_three_frames_in_one_batch():
  """Half of each frame remains in a ragged batch, as in each prompt alone."""
  slots = by_frame(recipes.get("fastv", layer=1, keep=0.5), 1.0)
  made = vlm_models.generator(slots)
  prompts = [[1, IMAGE, IMAGE, IMAGE, 5], [2, 3, IMAGE, IMAGE, 7], [4, 4]]
  images = vlm_models.images_of(prompts)
  packed, _ = made.pack(prompts, images)
  run = jax.jit(lambda p, x: made.model.apply({"params": p}, x))
  logits, out = run(made.params, packed)
  origin = np.asarray(packed.origin)
  visual = np.asarray(packed.kind) == int(Kind.VISUAL)
  left = np.asarray(out["remains"]) & visual
  for i, frames in enumerate((3, 2, 0)):
    count = np.bincount(origin[i, left[i], 0], minlength=frames)
    assert count.tolist() == [18] * frames
  # The frames of the others do not matter.
  others = vlm_models.images_of(prompts, seed=4)
  for i in range(2):
    mixed = [images[j] if i == j else others[j] for j in range(3)]
    again, _ = run(made.params, made.pack(prompts, mixed)[0])
    last = int(packed.length[i]) - 1
    np.testing.assert_allclose(
      again[i, last], logits[i, last], rtol=1e-4, atol=1e-4
    )


def test_what_cannot_be_shared_is_refused():
  with pytest.raises(ValueError, match=r"even=0\.0: must lie"):
    by_frame(recipes.get("fastv"), 0.0)
  with pytest.raises(ValueError, match="'visionzip' has no reduction"):
    by_frame(recipes.get("visionzip"))
