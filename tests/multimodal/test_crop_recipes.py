"""Recipes whose rules are told what an encoder saw, against slow versions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache.cases import QUICK
from tests.multimodal import reference_crops as slow
from tests.multimodal import vlm_models
from tests.multimodal.vlm_models import DECODE, IMAGE
from tokjax import recipes
from tokjax.budgets import Once, Share
from tokjax.models import ViT
from tokjax.models.any_resolution import NEWLINE, Crops, best_size, layout
from tokjax.reduce.site import Site
from tokjax.signals import Answers, Attention, Origin, Seen
from tokjax.slots import Slots
from tokjax.tokens import Kind, Tokens

CLOSE = dict(rtol=1e-4, atol=1e-4)
POINTS, SIDES = ((12, 24), (24, 24), (36, 12)), (6, 6)
# Of images: two crops, four, four with padding, three.
SIZES = ((12, 24), (24, 24), (24, 17), (40, 13))
PROMPTS = (
  [1, IMAGE, 7, 9, 3], [2, 5], [IMAGE, 8, 4, 6], [3, IMAGE], [IMAGE, 1, 2]
)  # fmt: skip
CASES = {
  "hired": (
    lambda: recipes.get("hired", budget=Once(Share(0.3))),
    lambda s: slow.hired(*s.rows, *s.parts, 0.3, 0.5, False),
  ),
  "hired_in_stripes": (
    lambda: recipes.get(
      "hired", budget=Once(Share(0.2)), share=0.3, stripes=True
    ),
    lambda s: slow.hired(*s.rows, *s.parts, 0.2, 0.3, True),
  ),
  "globalcom2": (
    lambda: recipes.get("globalcom2"),
    lambda s: slow.globalcom2(s.logits, *s.parts, 0.25, 10.0),
  ),
  "globalcom2_cold": (
    lambda: recipes.get("globalcom2", temperature=0.5, keep=0.4),
    lambda s: slow.globalcom2(s.logits, *s.parts, 0.4, 0.5),
  ),
}  # fmt: skip


@dataclasses.dataclass
class Told:
  """What the encoder says of one image.

  Attributes:
    rows: class attention in the first and the last block, `[crops + 1, n]`.
    logits: of the class token in the block ahead.
    parts: sides of a crop, rows and columns of crops, indices without padding.
    maps: attention of the last block, `[crops + 1, h, n + 1, n + 1]`.
  """

  rows: tuple
  logits: np.ndarray
  parts: tuple
  maps: np.ndarray


@functools.cache
def images() -> list[list[Crops]]:
  rng = np.random.default_rng(8)
  found = []
  for size in SIZES:
    high, wide = best_size(size, POINTS)
    many = 1 + high * wide // 144
    pixels = rng.normal(size=(many, 12, 12, 3)).astype(np.float32)
    found.append(Crops(pixels, size))
  return [found[:1], [], found[1:2], found[2:3], found[3:]]


def config(**changes):
  return vlm_models.config(pinpoints=POINTS, **changes)


@functools.cache
def told() -> list[Told | None]:
  """Of the image of each prompt."""
  cfg = config()
  params = vlm_models.params_of(cfg)
  vit = ViT(cfg.vision, Slots(collect=(Attention(),)))
  run = jax.jit(
    lambda x: vit.apply({"params": params["vision"]}, x)[1],
    compiler_options=QUICK,
  )  # fmt: skip
  own, found = jax.device_get(params["ahead"]), []
  for of_prompt in images():
    if not of_prompt:
      found.append(None)
      continue
    (image,) = of_prompt
    out = run(image.pixels)
    maps = [
      np.asarray(out["signals"][i][Attention().answered(i)], np.float64)
      for i in range(cfg.vision.depth)
    ]
    hidden = np.asarray(out["tokens"].x, np.float64)
    mean, var = (f(hidden, axis=-1, keepdims=True) for f in (np.mean, np.var))
    y = (hidden - mean) / np.sqrt(var + cfg.vision.epsilon)
    y = y * own["norm1"]["scale"] + own["norm1"]["bias"]
    q, k = (
      y @ own["attention"][name]["kernel"] + own["attention"][name]["bias"]
      for name in ("query", "key")
    )
    heads, width = cfg.vision.heads, q.shape[-1]
    # The mean over heads of products is that of whole vectors, over heads.
    logits = (k @ q[:, 0][..., None])[..., 0] / heads
    logits = logits / np.sqrt(width // heads)
    places = layout(image.size, POINTS, 12, SIDES)
    places = np.unique(places[places != NEWLINE])
    crops = tuple(n // 12 for n in best_size(image.size, POINTS))
    shown = [
      [int(i % 36) for i in places if i // 36 == c]
      for c in range(1, 1 + crops[0] * crops[1])
    ]
    rows = tuple(maps[i][:, :, 0, 1:].sum(axis=1) for i in (0, -1))
    found.append(Told(rows, logits[:, 1:], (SIDES, crops, shown), maps[-1]))
  return found


def packed(slots):
  """A model and its prompts."""
  made = vlm_models.generator(slots, pinpoints=POINTS)
  made = dataclasses.replace(
    made, capacity=256, buckets=(16, 256), image_buckets=(16,)
  )
  return made, made.pack(PROMPTS, images())


def kept(prompts, out, i: int) -> list[tuple[int, int]]:
  """Visual tokens of a prompt that remain, as pairs of crop and index."""
  source = np.arange(prompts.tokens.shape[1])
  for plan in (plan for made in out["plans"] for plan in made):
    source = source[np.asarray(plan.anchor[i])[np.asarray(plan.valid[i])]]
  kind = np.asarray(prompts.kind[i])
  origin = np.asarray(prompts.origin[i])
  return [
    (int(origin[j, 1]), int(origin[j, 2] * SIDES[1] + origin[j, 3]))
    for j in source
    if kind[j] == Kind.VISUAL
  ]


def in_order(found, told: Told):
  """As tokens stand in a prompt: the whole image, then lines of crops."""
  wide = told.parts[1][1]

  def key(token):
    crop, i = token
    (row, column), c = divmod(i, SIDES[1]), crop - 1
    return (
      c // wide * SIDES[0] + row, c % wide * SIDES[1] + column
    )  # fmt: skip

  whole = [token for token in found if not token[0]]
  return whole + sorted((t for t in found if t[0]), key=key)


@pytest.mark.parametrize("case", CASES)
def test_crops_keep_what_a_slow_version_keeps(case):
  made, (prompts, _) = packed(CASES[case][0]())
  run = jax.jit(
    lambda p: made.model.apply({"params": made.params}, p),
    compiler_options=QUICK,
  )
  _, out = run(prompts)
  for i, own in enumerate(told()):
    if own is None:
      assert not kept(prompts, out, i)
      continue
    expected = in_order(CASES[case][1](own), own)
    assert kept(prompts, out, i) == expected, (case, i)
    newlines = np.asarray(prompts.kind[i]) == Kind.NEWLINE
    assert np.asarray(out["remains"][i])[newlines].all()


@pytest.mark.parametrize(("ratio", "cell"), [(0.5, 2.5), (0.2, 1.75)])
def test_what_is_pruned_is_recycled_in_cells(ratio, cell):
  """VFlowOpt; the second setting has more cells than there is room for."""
  slots = recipes.get(
    "vflowopt", ratios=(ratio, 0.8, 0.5), cell=cell, threshold=1.5
  )
  made, (prompts, _) = packed(slots)
  _, out = jax.jit(
    lambda p: made.model.apply({"params": made.params}, p),
    compiler_options=QUICK,
  )(prompts)  # fmt: skip
  plan, more = out["plans"][0]
  (last,) = out["plans"][1]
  matrix = np.asarray(jax.vmap(lambda p: p.matrix())(plan))
  origin = np.asarray(prompts.origin)
  for i, own in enumerate(told()):
    if own is None:
      continue
    name = [(int(o[1]), int(o[2] * 6 + o[3])) for o in origin[i]]
    importance = np.array([slow.flow(m, 1.5)[1:] for m in own.maps])
    many = sum(map(len, own.parts[2])) + 36
    expected = slow.vflowopt(
      importance, *own.parts, ratio, cell, room=round(many * ratio)
    )
    assert len(expected) <= round(many * ratio)
    weights, found = dict(expected), []
    for j, at in enumerate(np.asarray(plan.anchor[i])):
      if not plan.valid[i, j] or prompts.kind[i, at] != Kind.VISUAL:
        continue
      found.append(name[at])
      row = {name[k]: matrix[i, j, k] for k in np.flatnonzero(matrix[i, j])}
      assert set(row) == set(weights[name[at]])
      for token, weight in weights[name[at]].items():
        np.testing.assert_allclose(row[token], weight, rtol=1e-4)
    assert found == in_order(sorted(weights), own)
    # Then the best by the same map, at two blocks.
    source = np.arange(prompts.tokens.shape[1])
    for step, share in ((plan, 1), (more, 0.8), (last, 0.4)):
      at = np.asarray(step.anchor[i])[np.asarray(step.valid[i])]
      source = source[at]
      now = [name[j] for j in source if prompts.kind[i, j] == Kind.VISUAL]
      count = max(int(many * round(ratio * share, 6)), 1)
      best = sorted(found, key=lambda t: -importance[t[0]][t[1]])[:count]
      if share < 1:
        assert now == in_order(sorted(best), own)


@pytest.mark.parametrize(
  ("noise", "keep"), [(0.0, 30), (0.4, 30), (0.4, 8), (9.0, 30)]
)
def test_frames_merge_where_they_are_alike(noise, keep):
  """LFTR: frames that are the same, alike, unlike; text between them."""
  rng, (frames, n) = np.random.default_rng(3), (4, 6)
  base = rng.normal(size=(n, 5))
  x = np.concatenate([
    base + noise * rng.normal(size=(n, 5)) for _ in range(frames)
  ])  # fmt: skip
  x = np.insert(x, 2 * n, 1.0, axis=0).astype(np.float32)
  image = np.insert(np.repeat(np.arange(frames), n), 2 * n, -1)
  place = np.insert(np.tile(np.arange(n), frames), 2 * n, -1)
  origin = np.stack([image, 0 * image, place // 3, place % 3], axis=-1)
  origin = np.pad(origin, ((0, 0), (0, 4))).astype(np.int32)
  visual, score = image >= 0, rng.random(len(x)).astype(np.float32)
  (reduce,) = recipes.get("lftr").reduce
  answers = Answers().add(Origin().answered(0), jnp.asarray(origin))
  (seen,) = [q for q in reduce.asks if isinstance(q, Seen)]
  answers = answers.add(seen.answered(0), jnp.asarray(score))

  @jax.jit
  def left(x):
    site = Site(Tokens.create(x), answers, min(keep, 25),
                free_at=jnp.asarray(visual))  # fmt: skip
    plan = reduce.rule(site)
    return plan.apply(x), plan.valid

  found, valid = left(x)
  places = list(zip(image[visual], place[visual], strict=True))
  expected = slow.lftr(x[visual], places, score[visual], 0.9, keep)
  np.testing.assert_allclose(found[valid], expected, **CLOSE)
  if noise == 0:
    assert valid.sum() == n


def test_a_ragged_batch_equals_each_prompt_alone():
  slots = recipes.get("hired", budget=Once(Share(0.3)))
  made, (prompts, _) = packed(slots)
  more = np.random.default_rng(6).integers(1, 38, (DECODE, len(PROMPTS)))
  found = []
  for chosen in (slice(None), slice(2, 3)):
    going = made.prefill(PROMPTS[chosen], images()[chosen])
    logits = [np.asarray(going.logits)]
    for token in more[:, chosen].astype(np.int32):
      going = made.step(going, token)
      logits.append(np.asarray(going.logits))
    found.append(np.stack(logits))
  np.testing.assert_allclose(found[0][:, 2:3], found[1], **CLOSE)
  whole, out = jax.jit(
    lambda p: made.model.apply({"params": made.params}, p),
    compiler_options=QUICK,
  )(prompts)  # fmt: skip
  for i, n in enumerate(prompts.length):
    np.testing.assert_allclose(found[0][0, i], whole[i, n - 1], **CLOSE)


def test_an_image_that_is_seen_once_keeps_its_best_patches():
  slots = recipes.get("hired", budget=Once(Share(0.3)))
  plain = recipes.get("fastervlm", budget=Share(0.3))
  found = [
    vlm_models.generator(s).prefill(
      vlm_models.PROMPTS[:2], vlm_models.images_of(vlm_models.PROMPTS[:2])
    ).logits
    for s in (slots, plain)
  ]  # fmt: skip
  np.testing.assert_allclose(*found, **CLOSE)


@pytest.mark.parametrize(
  ("other", "changes", "message"),
  [
    ("fastervlm", {}, "tower 'vision' reduces them"),
    ("divprune", {}, "tower 'projector' reduces them"),
    (Slots(pass_class=True).within("vision"), {}, "class token goes on"),
    (Slots(), {"ahead": False}, "ahead of the features"),
  ],
)
def test_what_towers_cannot_answer_is_refused(other, changes, message):
  slots = recipes.compose("globalcom2", other)
  with pytest.raises(ValueError, match=f"(?s)globalcom2.*{message}"):
    vlm_models.model(slots, pinpoints=POINTS, **changes)
