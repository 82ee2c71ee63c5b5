"""The sweep of language models from end to end, on models of two steps."""

import json

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from configs import kv_pareto
from experiments import sweep, typed
from experiments.sweeps import decoding, language_models, report
from experiments.sweeps.subject import UNREDUCED
from tests.interop import checkpoints


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("kv")
  return workdir, sweep.main(kv_pareto.get_config("runlocal"), workdir)


def test_writes_rows_table_and_plots(done, capsys):
  workdir, results = done
  found = json.loads((workdir / "kv_pareto.json").read_text())
  rows = {(row["method"], row["keep"]): row for row in found["rows"]}
  assert set(rows) == {
    ("none", 1.0), ("random_kv", 0.5), ("streaming_llm", 0.5),
  }  # fmt: skip
  assert not found["unreachable"]
  for row in rows.values():
    assert 0 <= row["recall"] <= 1 and 0 <= row["multi_key_recall"] <= 1
    assert np.shape(row["recall_map"]) == (2, 2)
    assert row["decode_ms"] > 0 and row["decode_speedup"] > 0
    assert row["nats_per_token"] > 1
  whole, half = rows["none", 1.0], rows["random_kv", 0.5]
  assert half["physical_bytes"] < whole["physical_bytes"]
  assert half["logical_bytes"] < whole["logical_bytes"]
  for name in ("kv_pareto.png", "recall.png"):
    assert (workdir / name).read_bytes().startswith(b"\x89PNG")
  subject = sweep.load(kv_pareto.get_config("runlocal")).prepare(workdir)
  report.show(subject.table(results))
  assert "streaming_llm" in capsys.readouterr().out


def test_full_cache_reads_text_as_the_plain_model_does(done):
  workdir, results = done
  config = sweep.load(kv_pareto.get_config("runlocal"))
  n, steps = config.context, config.steps
  subject = config.subject.prepare(workdir, config.grid, 4, n + steps + 1)
  lm, windows = subject.text, np.asarray(subject.windows)
  model = lm.build(UNREDUCED.slots())
  forward = jax.jit(lambda p, x: model.apply({"params": p}, x)[0])
  logits = forward(lm.params, windows[:, :-1])
  logits = np.asarray(logits, np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  meant = windows[:, n + 1 :]
  said = np.take_along_axis(log_p[:, n:], meant[..., None], -1)
  np.testing.assert_allclose(
    results.whole["nats_per_token"], -said.mean(), rtol=1e-5
  )


def test_goes_on_where_it_was(done, monkeypatch):
  workdir, results = done
  compiled = []
  compile_one = decoding.compile_one

  def spy(lm, job, shape):
    compiled.append(job.method)
    return compile_one(lm, job, shape)

  monkeypatch.setattr(decoding, "compile_one", spy)
  again = sweep.main(kv_pareto.get_config("runlocal"), workdir)
  assert not compiled and again.rows == results.rows


def test_options_that_a_recipe_lacks_are_refused_before_training(tmp_path):
  config = kv_pareto.get_config("runlocal")
  config.options = {"streaming_llm": {"frist": 1}}
  with pytest.raises(typed.ConfigError, match="'streaming_llm'.*'frist'"):
    sweep.main(config, tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.fixture
def published(tmp_path):
  """A checkpoint of random weights that reads bytes."""
  folder = tmp_path / "checkpoint"
  folder.mkdir()
  checkpoints.write(folder, vocab_size=256, max_position_embeddings=1024)
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  ids = {letter: i for i, letter in enumerate(alphabet)}
  made = tokenizers.Tokenizer(models.BPE(ids, []))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.save(str(folder / "tokenizer.json"))
  return folder


def test_a_published_checkpoint_by_name(published, tmp_path):
  """The needles are sentences in its text; nothing is trained."""
  config = kv_pareto.get_config(f"runlocal,checkpoint={published}")
  config.context, config.steps, config.recipes = 16, 4, ("random_kv",)
  results = sweep.main(config, tmp_path / "new" / "run")
  assert [row["method"] for row in results.rows] == ["none", "random_kv"]
  whole, half = results.rows
  assert half["physical_bytes"] < whole["physical_bytes"]
  assert np.isfinite(whole["nats_per_token"])
  with pytest.raises(ValueError, match="has no tokenizer.json"):
    (published / "tokenizer.json").unlink()
    language_models._read.cache_clear()
    sweep.main(config, tmp_path / "other")
