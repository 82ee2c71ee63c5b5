"""Checkpoints that `transformers` wrote, fine-tuned here, and back again."""

import json

import jax
import numpy as np
import pytest

from configs.learned import finetune
from experiments import export, train
from experiments.training import config as config_lib
from experiments.training import mesh as mesh_lib
from experiments.training import published, trees
from tests.experiments.published_checkpoints import write_images
from tests.interop.helpers import apply, images
from tests.interop.references import (
  REFERENCES,
  SHAPE,
  as_torch,
  randomise,
  torch,
  transformers,
)
from tokjax import interop

PROCESSOR = dict(
  do_resize=True, size=dict(height=36, width=36), resample=3,
  do_center_crop=True, crop_size=dict(height=32, width=32), do_rescale=True,
  rescale_factor=1 / 255, do_normalize=True, image_mean=[0.5, 0.4, 0.3],
  image_std=[0.2, 0.2, 0.2], image_processor_type="DeiTImageProcessor",
)  # fmt: skip
LABELS = {0: "tench, Tinca tinca", 1: "goldfish", 2: "golden retriever"}


def write_processor(folder):
  (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))


def test_dynamicvit_on_deit(tmp_path):
  """Train, export: `transformers` computes what the plain model computes."""
  source, out = tmp_path / "deit", tmp_path / "out"
  shape = SHAPE | dict(num_hidden_layers=1)
  config = transformers.DeiTConfig(**shape, id2label=LABELS)
  theirs = randomise(transformers.DeiTForImageClassificationWithTeacher(config))
  theirs.save_pretrained(source)
  write_processor(source)
  own = write_images(tmp_path / "images")
  words = f"checkpoint={source},images={own},runlocal"
  fine_tuning = finetune.get_config(words)
  # It would be compiled as well; tests of the loop have it.
  fine_tuning.teacher = None
  done = train.main(fine_tuning, tmp_path / "run")
  assert done.config.data.classes == tuple(LABELS.values())
  export.main(tmp_path / "run", out)
  back, info = type(theirs).from_pretrained(out, output_loading_info=True)
  assert not any(info[k] for k in ("missing_keys", "unexpected_keys"))
  assert back.config.id2label == LABELS
  assert transformers.AutoConfig.from_pretrained(out).model_type == "deit"
  processor = (out / "preprocessor_config.json").read_bytes()
  assert processor == (source / "preprocessor_config.json").read_bytes()
  model, params, _ = interop.load(out)
  x = images(32, 32)
  with torch.no_grad():
    expected = back.eval()(as_torch(x)).logits.numpy()
    before = theirs(as_torch(x)).logits.numpy()
  ours = np.asarray(apply(model, params, x)[0])
  assert np.abs(ours - expected).max() < 1e-5
  assert np.abs(before - expected).max() > 1e-5, "it was trained"


@pytest.mark.parametrize(
  "name", [n for n in REFERENCES if n.startswith(("clip", "siglip", "dino"))]
)
def test_towers_get_a_classifier(name, tmp_path):
  """All but the head is the checkpoint's."""
  randomise(REFERENCES[name].make()).save_pretrained(tmp_path / "tower")
  write_processor(tmp_path / "tower")
  own = write_images(tmp_path / "images", ("a", "b", "c"), each=1)
  words = f"checkpoint={tmp_path / 'tower'},images={own},head=new,runlocal"
  config = config_lib.load(finetune.get_config(words))
  assert config.model.num_classes == 3 and config.model.projection is None
  x = images(*config.model.image_sides, batch=1)
  model, key = config.build_model(), jax.random.key(0)
  shapes = jax.eval_shape(
    lambda x: model.init(key, x, key=key)["params"], x
  )
  found = published.first_params(config, mesh_lib.Mesh().build())
  found = published.without_fresh(found, config.fresh, shapes)
  started = trees.named(trees.overlay(shapes, found, "init"))
  random = [n for n, x in started.items() if not isinstance(x, jax.Array)]
  assert {"head/classifier/bias", "head/classifier/kernel"} < set(random)
  assert all("learned" in n or "head/classifier" in n for n in random)
