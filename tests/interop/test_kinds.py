"""Commands that want one kind of model say so of a checkpoint of another."""

import pytest

from experiments import pictures
from experiments.data import Digits
from experiments.sweeps import classifiers, language_models
from tests.interop import checkpoints
from tests.interop.helpers import config, random_params
from tokjax import interop


def test_a_language_model_is_no_model_of_images(tmp_path):
  checkpoints.write(tmp_path)
  subject = classifiers.Pretrained(str(tmp_path), Digits())
  with pytest.raises(ValueError, match="is a Decoder, no model of images"):
    subject.prepare(tmp_path)
  with pytest.raises(ValueError, match="is a Decoder, no model of images"):
    pictures.encoder(str(tmp_path), 32, 8)


def test_a_model_of_images_is_no_language_model(tmp_path):
  interop.save(tmp_path, config(), random_params(config()))
  with pytest.raises(ValueError, match="is a ViT, no language model"):
    language_models.Pretrained(str(tmp_path)).prepare(tmp_path)
