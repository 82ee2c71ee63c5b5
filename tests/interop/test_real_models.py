"""Published models of `tokjax models`, where they were fetched."""

import jax
import numpy as np
import pytest

from tokjax import interop, zoo
from tokjax.models import Generator

pytest.importorskip(
  "gguf", reason="real models are tested where the package gguf is installed"
)
pytestmark = pytest.mark.slow

TEXT = "Hello world 123 4567, it's   fine\n\n  def f(x):\n\treturn x**2"
# As `transformers` 5.24 reads the same files.
IDS = {
  "smollm2": [
    19556, 905, 216, 33, 34, 35, 216, 36, 37, 38, 39, 28, 357, 506, 256, 4979,
    8866, 753, 275, 24, 104, 727, 198, 197, 5406, 1792, 828, 34,
  ],
}  # fmt: skip
CONTINUED = {"smollm2": " Paris.", "gemma3-270m": " the capital of the"}
NORTH = "The capital of France is"


@pytest.fixture(scope="module", params=CONTINUED)
def real(request):
  path = zoo.find(request.param)
  if path is None:
    pytest.skip(
      f"{request.param} was not fetched: tokjax models get {request.param}"
    )
  return request.param, path, *interop.load(path)


def test_ids_and_text(real):
  name, _, model, params, tokenizer = real
  ids = tokenizer.encode(TEXT)
  assert ids == IDS.get(name, ids) and tokenizer.decode(ids) == TEXT
  made = Generator(model, params, capacity=16, decode=4)
  (out,) = made.generate([tokenizer.encode(NORTH)], ends=tokenizer.ends)
  assert tokenizer.decode(out).startswith(CONTINUED[name])


def test_logits_equal_the_reference_over_600_tokens(real):
  name, path, model, params, tokenizer = real
  torch = pytest.importorskip("torch", reason="torch is not installed")
  transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed"
  )
  utils = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
  config = transformers.AutoConfig.from_pretrained(
    path.parent, gguf_file=path.name
  )
  theirs = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32
  ).eval()
  read = utils.load_gguf_checkpoint(
    str(path), return_tensors=True, model_to_load=theirs
  )
  missing, extra = theirs.load_state_dict(read["tensors"], strict=False)
  assert not extra and set(missing) <= {"lm_head.weight"}
  theirs.tie_weights()
  text = zoo.__doc__ + interop.load.__doc__ + Generator.__doc__
  ids = np.array(tokenizer.encode(text * 2)[:600], np.int32)[None]
  assert ids.shape == (1, 600)
  with torch.no_grad():
    expected = theirs(torch.tensor(ids).long()).logits.numpy()
  ours = jax.jit(lambda p, t: model.apply({"params": p}, t)[0])(params, ids)
  assert np.abs(np.asarray(ours) - expected).max() < 1e-3
  assert np.abs(expected).max() > 20
