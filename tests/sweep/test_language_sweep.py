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
from experiments.sweeps.subject import UNREDUCED, Job, Unfit
from tests.interop import checkpoints


def two_seeds():
  config = kv_pareto.get_config("runlocal")
  config.subject.seeds = 2
  return config


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("kv")
  return workdir, sweep.main(two_seeds(), workdir)


def test_rows_are_means_over_seeds(done):
  workdir, results = done
  for row in results.rows:
    for name in ("recall", "multi_key_recall"):
      moved = 100 * (results.whole[name] - row[name])
      by_seed = row[f"{name}_lost_by_seed"]
      assert len(by_seed) == 2
      np.testing.assert_allclose(np.mean(by_seed), moved, atol=1e-9)
    nats = row["nats_per_token"] - results.whole["nats_per_token"]
    np.testing.assert_allclose(
      np.mean(row["nats_lost_by_seed"]), nats, rtol=1e-3, atol=1e-5
    )
    assert len(set(row["nats_lost_by_seed"])) == 2 or row["method"] == "none"
    assert (row["nats_interval"] > 0) == (row["method"] != "none")
  lines = (workdir / "kv_pareto.csv").read_text().splitlines()
  assert len(lines) == 1 + len(results.rows)
  assert "nats_interval" in lines[0] and "recall_map" not in lines[0]
  seeds = {path.name for path in workdir.iterdir() if path.is_dir()}
  assert {"recall", "text", "recall_1", "text_1"} <= seeds


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
  subject = sweep.load(two_seeds()).prepare(workdir)
  report.show(subject.table(results))
  assert "streaming_llm" in capsys.readouterr().out


def test_full_cache_reads_text_as_the_plain_model_does(done):
  workdir, results = done
  config = sweep.load(two_seeds())
  n, steps = config.context, config.steps
  subject = config.subject.prepare(workdir, config.grid, 4, n + steps + 1)
  lm, windows = subject.text, np.asarray(subject.windows)
  model = lm.build(UNREDUCED.slots())
  forward = jax.jit(lambda p, x: model.apply({"params": p}, x)[0])
  said = []
  for _, params in subject.weights:
    logits = np.asarray(forward(params, windows[:, :-1]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    meant = windows[:, n + 1 :]
    said.append(np.take_along_axis(log_p[:, n:], meant[..., None], -1))
  np.testing.assert_allclose(
    results.whole["nats_per_token"], -np.mean(said), rtol=1e-5
  )


def test_goes_on_where_it_was(done, monkeypatch):
  workdir, results = done
  compiled = []
  build = decoding.build

  def spy(lm, job, shape, dense):
    compiled.append(job.method)
    return build(lm, job, shape, dense)

  monkeypatch.setattr(decoding, "build", spy)
  again = sweep.main(two_seeds(), workdir)
  assert not compiled and again.rows == results.rows


def test_windows_shrink_where_prompts_are_short(done, capsys):
  workdir, results = done
  subject = sweep.load(two_seeds()).prepare(workdir)
  job = Job("snapkv", 0.25)
  programs = subject.compile(job)
  for group in programs.of:
    lm, prompt = subject.models.model(group.model), group.shape.prompt
    fitted, _ = decoding.fitted(lm, job, group.shape)
    window = dict(fitted.options)["window"]
    # Half of what is kept at most, so that there is something to choose.
    assert window <= prompt // 8 < 64
    note = f"{prompt} tokens: recipe 'snapkv': window={window} instead of"
    assert note in programs.fitted
  results.rows.append(dict(results.rows[-1], method="snapkv", fitted="window"))
  report.show(subject.table(results))
  results.rows.pop()
  assert "snapkv at keep 0.5, window" in capsys.readouterr().out
  # What a user has set is not changed.
  with pytest.raises(Unfit, match="fewer than the 64 that are protected"):
    subject.compile(Job("snapkv", 0.25, (("window", 64),)))


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
