"""Language models equal `transformers` on random weights, in float32."""

import jax
import numpy as np
import pytest

from tests.interop.language_references import REFERENCES, make, torch
from tokjax import interop
from tokjax.interop import files

# The requirement is 1e-4.
BOUND = 2e-5
LENGTHS = (12, 7)


@pytest.fixture(scope="module", params=REFERENCES)
def pair(request, tmp_path_factory):
  """A reference model, its folder in two shards, and our import of it."""
  theirs = make(request.param)
  folder = tmp_path_factory.mktemp(request.param)
  theirs.save_pretrained(folder, max_shard_size="30KB")
  assert (folder / files.INDEX).exists()
  model, params, tokenizer = interop.load(folder)
  assert tokenizer is None
  return theirs, model, params


def test_logits_equal_the_reference_alone_and_padded(pair, record_property):
  theirs, model, params = pair
  rng = np.random.default_rng(1)
  tokens = rng.integers(3, 50, (2, 12)).astype(np.int32)
  mask = np.arange(12)[None] < np.array(LENGTHS)[:, None]
  forward = jax.jit(lambda p, t, m: model.apply({"params": p}, t, mask=m)[0])
  ours = np.asarray(forward(params, tokens, mask))
  for row, length in enumerate(LENGTHS):
    with torch.no_grad():
      alone = torch.tensor(tokens[row : row + 1, :length]).long()
      expected = theirs(alone).logits.numpy()[0]
    assert np.abs(expected).max() > 0.5
    worst = np.abs(ours[row, :length] - expected).max()
    record_property("max_abs_difference", float(worst))
    assert worst < BOUND


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_model_whose_file_has_an_output_matrix(same, tmp_path):
  """`transformers` ties only if the two tensors are equal; so do we."""
  theirs = make("qwen2-yarn")
  theirs.save_pretrained(tmp_path)
  path = tmp_path / files.SINGLE
  with files.opened(path) as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}
  assert "lm_head.weight" not in tensors
  head = tensors["model.embed_tokens.weight"].copy()
  head[7] += 0.0 if same else 1.0
  files.save_file(
    {**tensors, "lm_head.weight": head}, path, metadata={"format": "pt"}
  )
  theirs = type(theirs).from_pretrained(tmp_path).eval()
  model, params, _ = interop.load(tmp_path)
  assert model.config.tied == same == ("head" not in params)
  assert interop.config_from(tmp_path) == model.config
  tokens = np.random.default_rng(1).integers(3, 50, (1, 6)).astype(np.int32)
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens).long()).logits.numpy()
  ours = jax.jit(lambda p, t: model.apply({"params": p}, t)[0])(params, tokens)
  assert np.abs(np.asarray(ours) - expected).max() < BOUND
