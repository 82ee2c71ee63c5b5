"""timm's layout: against a plain torch reference, and timm where it imports."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.interop.helpers import apply, assert_same_tensors, images, stored
from tests.interop.references import as_torch, randomise, torch
from tests.interop.timm_reference import VisionTransformer
from tokjax import interop

BASE = dict(
  img_size=32,
  patch_size=8,
  embed_dim=32,
  depth=2,
  num_heads=4,
  mlp_ratio=2.0,
  num_classes=5,
)
VARIANTS = {
  "vit": {},
  "deit-distilled": {"distilled": True},
  "deit3": {"init_values": 1e-6, "no_embed_class": True},
  "no-qkv-bias": {"qkv_bias": False},
  # MAE fine-tuning: mean of the patches, then the norm.
  "mae-pooling": {"global_pool": "avg"},
  "mean-no-class": {
    "global_pool": "avg",
    "class_token": False,
    "fc_norm": False,
  },
  "registers": {"reg_tokens": 3, "no_embed_class": True, "init_values": 1e-5},
  "registers-with-positions": {"reg_tokens": 2},
  "rectangle": {"img_size": (24, 40)},
  "pre-norm-features": {"pre_norm": True, "num_classes": 0},
}


def write(folder, model, options, architecture="vit_base_patch16_224"):
  """A folder as timm writes it."""
  folder.mkdir(exist_ok=True)
  tensors = {
    name: np.ascontiguousarray(value.numpy())
    for name, value in model.state_dict().items()
  }
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  args = {k: v for k, v in options.items() if k != "distilled"}
  pool = args.get("global_pool", "token")
  config = {
    "architecture": architecture,
    "num_classes": args.pop("num_classes"),
    "global_pool": pool,
    "model_args": args,
    "pretrained_cfg": {"input_size": [3, 32, 32]},
  }
  (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
  options = {**BASE, **VARIANTS[request.param]}
  theirs = randomise(VisionTransformer(**options))
  folder = tmp_path_factory.mktemp(request.param)
  write(folder, theirs, options)
  model, params, _ = interop.load(folder)
  return options, theirs, folder, model, params


def difference(ours, theirs):
  theirs = theirs.detach().numpy()
  assert np.abs(theirs).max() > 0.1
  return np.abs(np.asarray(ours) - theirs).max()


def test_logits_equal_the_reference(pair):
  _, theirs, _, model, params = pair
  x = images(*model.config.image_sides)
  assert difference(apply(model, params, x)[0], theirs(as_torch(x))) < 1e-4


def test_another_image_size(tmp_path):
  options = {**BASE, "distilled": True}
  theirs = randomise(VisionTransformer(**options))
  write(tmp_path, theirs, options)
  model, params, _ = interop.load(tmp_path)
  x = images(24, 56)
  assert difference(apply(model, params, x)[0], theirs(as_torch(x))) < 1e-4


def test_round_trip_is_exact(pair, tmp_path):
  _, _, folder, model, params = pair
  interop.save(tmp_path, model.config, params, layout="timm")
  assert_same_tensors(stored(folder), stored(tmp_path))
  assert interop.config_from(tmp_path) == model.config


def test_timm_itself_agrees(pair, tmp_path):
  """timm reads what we write, and computes what the reference computes."""
  timm = pytest.importorskip(
    "timm",
    reason="timm (with torchvision) is not installed",
    exc_type=ImportError,
  )
  options, theirs, folder, model, params = pair
  interop.save(tmp_path, model.config, params, layout="timm")
  x = as_torch(images(*model.config.image_sides))
  for path in (folder, tmp_path):
    distilled = "_distilled" if options.get("distilled") else ""
    if path == folder and distilled:
      continue  # `write` does not name the distilled class
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    with torch.no_grad():
      torch.testing.assert_close(loaded(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_moves_between_timm_and_transformers(tmp_path):
  theirs = randomise(VisionTransformer(**BASE))
  write(tmp_path / "timm", theirs, BASE)
  model, params, _ = interop.load(tmp_path / "timm")
  interop.save(
    tmp_path / "hf", model.config, params, layout="ViTForImageClassification"
  )
  moved, moved_params, _ = interop.load(tmp_path / "hf")
  x = images()
  ours, _ = apply(moved, moved_params, x)
  assert difference(ours, theirs(as_torch(x))) < 1e-4


NAMES = {
  "deit_tiny_patch16_224": (192, 12, 3, 16, 224, 1, True, False),
  "deit_small_distilled_patch16_224": (384, 12, 6, 16, 224, 1, True, False),
  "vit_base_patch32_384": (768, 12, 12, 32, 384, 1, True, False),
  "vit_large_patch16_224_in21k": (1024, 24, 16, 16, 224, 1, True, False),
  "deit3_huge_patch14_224": (1280, 32, 16, 14, 224, 1, False, True),
  "vit_base_patch14_reg4_dinov2": (768, 12, 12, 14, 518, 5, False, True),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_architectures(name):
  from tokjax.interop.timm import Timm

  config = Timm().read({"architecture": name, "num_classes": 0}, ())
  assert NAMES[name] == (
    config.width,
    config.depth,
    config.heads,
    config.patch_size,
    config.image_size,
    len(config.kinds),
    config.position_on_class,
    config.layer_scale,
  )


@pytest.mark.parametrize(
  "name",
  ["vit_base_patch16_clip_224", "vit_medium_patch16_gap_240", "resnet50"],
)
def test_other_architectures_are_refused(name):
  from tokjax.interop.timm import Timm

  with pytest.raises(ValueError, match="not one of timm's plain ViT"):
    Timm().read({"architecture": name}, ())


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ({"qk_norm": True}, r"\['qk_norm'\] are not supported"),
    ({"global_pool": "map"}, "global_pool='map'"),
    ({"patch_size": [8, 16]}, "must be square"),
  ],
)
def test_other_arguments_are_refused(args, message):
  from tokjax.interop.timm import Timm

  whole = {"architecture": "vit_base_patch16_224", "model_args": args}
  with pytest.raises(ValueError, match=message):
    Timm().read(whole, ())
