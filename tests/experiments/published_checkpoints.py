"""Small published checkpoints and folders of images and text, made by hand."""

import pathlib

import jax
import numpy as np
import tokenizers
from PIL import Image

from tests.decoder.models import params_of
from tokjax import interop
from tokjax.interop import files
from tokjax.models import DecoderConfig, ViT, ViTConfig

# As ImageNet has them: synonyms, and a name that two labels share.
LABELS = ("tench, Tinca tinca", "crane", "golden retriever", "crane, bird")
VIT = ViTConfig(
  image_size=16, patch_size=4, width=16, depth=1, heads=2, mlp_dim=24,
  num_classes=len(LABELS), epsilon=1e-12,
)  # fmt: skip
HOW = interop.Preprocessing((0.5,) * 3, (0.25,) * 3, 16, crop_fraction=16 / 18)
DECODER = DecoderConfig(
  vocabulary=40, width=16, depth=1, heads=2, kv_heads=1, mlp_dim=24, length=64,
  tied=False,
)  # fmt: skip


def vit_params(config: ViTConfig = VIT, seed: int = 0):
  """Parameters that are all drawn."""
  image = np.zeros((1, *config.image_sides, 3), np.float32)
  shapes = jax.eval_shape(ViT(config).init, jax.random.key(0), image)["params"]
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(seed)
  drawn = [rng.normal(0, 0.3, x.shape).astype(np.float32) for x in leaves]
  return jax.tree.unflatten(tree, drawn)


def write_vit(folder: pathlib.Path, **options) -> pathlib.Path:
  """A ViT with labels and preprocessing."""
  given = dict(labels=LABELS, preprocessing=HOW) | options
  interop.save(folder, VIT, vit_params(), **given)
  return folder


def write_llama(folder: pathlib.Path) -> pathlib.Path:
  """A Llama with a tokenizer of letters."""
  interop.save(folder, DECODER, params_of(DECODER))
  whole = files.read_json(folder / "config.json")
  files.write_json(folder / "config.json", {**whole, "eos_token_id": 1})
  letters = "abcdefghijklmnopqrstuvwxyz .,\n"
  ids = {"<unk>": 0, "</s>": 1, **{x: i + 2 for i, x in enumerate(letters)}}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, "<unk>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
  made.save(str(folder / "tokenizer.json"))
  return folder


def write_images(
  folder: pathlib.Path, classes=("golden_retriever", "Tench"), each=8
) -> pathlib.Path:
  """Noise around one colour a class, with train and test."""
  rng = np.random.default_rng(0)
  for split in ("train", "test"):
    for k, name in enumerate(classes):
      target = folder / split / name
      target.mkdir(parents=True)
      for i in range(each):
        image = 60 * k + rng.integers(0, 60, (20, 24, 3))
        Image.fromarray(image.astype(np.uint8)).save(target / f"{i}.png")
  return folder


def write_texts(folder: pathlib.Path, count: int = 40) -> pathlib.Path:
  """Short texts of letters."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i in range(count):
    text = "".join(rng.choice(list("abc .")) for _ in range(40))
    (folder / f"{i}.txt").write_text(text)
  return folder
