"""`transformers` reads language models that we write, and computes the same."""

import numpy as np
import pytest

from tests.interop.helpers import assert_same_tensors, stored
from tests.interop.language_references import (
  REFERENCES,
  make,
  torch,
  transformers,
)
from tokjax import interop


@pytest.mark.parametrize("name", REFERENCES)
def test_language_models_load_in_transformers(name, tmp_path):
  theirs = make(name)
  theirs.save_pretrained(tmp_path / "in")
  model, params, _ = interop.load(tmp_path / "in")
  interop.save(tmp_path / "out", model.config, params)
  assert_same_tensors(stored(tmp_path / "in"), stored(tmp_path / "out"))
  layout = interop.layout_for(model.config, tmp_path / "in")
  assert layout == type(theirs).__name__
  interop.save(tmp_path / "out", model.config, params, layout=layout)
  back, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", output_loading_info=True, attn_implementation="eager"
  )
  assert type(back) is type(theirs)
  assert not any(info[key] for key in ("unexpected_keys", "mismatched_keys"))
  assert not info["missing_keys"]
  tokens = np.random.default_rng(0).integers(3, 50, (2, 12))
  with torch.no_grad():
    before = theirs(torch.tensor(tokens)).logits
    after = back.eval()(torch.tensor(tokens)).logits
  torch.testing.assert_close(before, after, rtol=0, atol=1e-6)
  assert interop.config_from(tmp_path / "out").length == model.config.length
