"""`experiments.generate` from end to end, with a model of two steps."""

import pytest

from configs import generate as generate_config
from experiments import generate


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp("generate")


def run(workdir, arg, prompt, **changes):
  pieces = []
  config = generate_config.get_config(f"runlocal,{arg}")
  config.update(changes)
  done = generate.main(config, workdir, prompt, pieces.append)
  return done, "".join(pieces)


def test_streams_text_and_reports(workdir):
  done, shown = run(workdir, "", "import os")
  assert len(done.ids) == 8 and shown.startswith(done.text)
  assert "time to first token" in shown and "tokens/s" in shown
  assert done.physical == done.full and "100.0%" in shown
  # Greedy text is the same for prompts in chunks, and every time.
  again, _ = run(workdir, "", "import os", chunk=5)
  assert again.ids == done.ids


def test_compressed_cache_is_smaller(workdir):
  done, _ = run(workdir, "recipe=random_kv,keep=0.25", "import os, sys\n")
  assert done.physical < done.full and done.logical <= done.physical


def test_options_of_the_recipe(workdir):
  prompt = "import os, sys\n"
  with pytest.raises(ValueError, match="fewer than the 64 that are protected"):
    run(workdir, "recipe=snapkv,keep=0.4", prompt)
  done, _ = run(workdir, "recipe=snapkv,keep=0.4,window=2,kernel=3", prompt)
  assert done.physical < done.full
  with pytest.raises(ValueError, match="unknown option 'windw'"):
    run(workdir, "recipe=snapkv,windw=2", prompt)


@pytest.mark.parametrize(
  "prompt, message",
  [("", "is empty"), ("x" * 33, "33 tokens, the capacity is 32")],
)
def test_bad_prompts(workdir, prompt, message):
  with pytest.raises(ValueError, match=message):
    run(workdir, "", prompt)
