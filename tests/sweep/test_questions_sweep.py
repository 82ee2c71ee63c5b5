"""The sweep of vision-language models, on one of a second or two."""

import json
import types

import jax
import numpy as np
import pytest
from PIL import Image

from configs import vlm_budget, vlm_pareto
from experiments import sweep, typed, visual_tokens
from experiments.data.grid_questions import KINDS
from experiments.sweeps import (
  question_budget,
  question_models,
  question_programs,
  question_views,
  questions,
  runs,
)
from experiments.sweeps.subject import Job
from tests.contract.case import draw_params
from tokjax import interop
from tokjax.interop import model_shapes


@pytest.fixture(autouse=True)
def random_weights(monkeypatch):
  """Training gives random parameters, those of its seed; counts its calls."""
  calls = []

  def trained(config, folder):
    calls.append(folder.name)
    made, prompts = model_shapes.specimen(config.model)
    shapes = jax.eval_shape(made.init, jax.random.key(0), prompts)["params"]
    return draw_params(shapes)

  monkeypatch.setattr(runs, "trained", trained)
  return calls


def config(**changes):
  found = vlm_pareto.get_config("runlocal")
  found.recipes = ("random_visual", "fastv", "todre", "covipal", "flash")
  found.rounds = 1
  for name, value in changes.items():
    found[name] = value
  return found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp("sweep")


def test_rows_plots_and_what_goes_on(workdir, monkeypatch):
  results = sweep.main(config(), workdir)
  found = json.loads((workdir / "vlm_pareto.json").read_text())
  rows = {(row["method"], row["keep"]): row for row in found["rows"]}
  assert set(rows) == {("none", 1.0), ("random_visual", 0.5), ("fastv", 0.5)}
  lost = {row["method"]: row["reason"] for row in found["unreachable"]}
  assert set(lost) == {"todre", "covipal", "flash"}
  assert "'ahead'" in lost["todre"] and "Speculative" in lost["flash"]
  assert "was not trained with" in lost["covipal"]
  whole, blind = rows["none", 1.0], rows["random_visual", 0.5]
  inside = rows["fastv", 0.5]
  assert whole["drift"] == 0 and whole["lost_all"] == 0
  assert whole["kept"] == whole["kept_named"] == 1
  assert inside["looks"] is None and len(whole["looks"]) == 3
  # The first block is local: it does not reach the image.
  assert whole["looks"][0] == [0, 0]
  assert all(0 < own < every < 1 for own, every in whole["looks"][1:])
  assert (whole["image_tokens"], blind["image_tokens"]) == (17, 9)
  # The class token stays; half of the patches go before the language model.
  assert blind["kept"] == 0.5 and 0.4 < inside["kept"] < 0.6
  assert blind["gflops"] < 0.7 * whole["gflops"]
  assert blind["logical_bytes"] < inside["logical_bytes"]
  assert inside["logical_bytes"] < whole["logical_bytes"]
  for row in rows.values():
    kinds = [row[f"accuracy_{kind}"] for kind in KINDS]
    assert row["accuracy_all"] == pytest.approx(np.mean(kinds))
    assert min(row[f"{name}_ms"] for name in ("prefill", "first", "decode")) > 0
  for name in ("vlm_pareto.csv", "vlm_pareto.png", "kept.png"):
    assert (workdir / name).stat().st_size > 200
  # Nothing is left to do: no program but that of the pictures is made.
  monkeypatch.setattr(questions.QuestionsSubject, "compile", None)
  again = sweep.main(config(), workdir)
  assert again.rows == results.rows


def test_what_remains_is_what_the_last_token_looks_at(tmp_path):
  """FastV keeps the half that the block before attends to most."""
  found = sweep.load(config())
  subject = found.prepare(tmp_path)
  asked = subject.model.asked[:3]
  stages = question_views.stages_of(subject.model, Job("fastv", 0.5), asked)
  assert [stage.name for stage in stages] == ["language, block 3"]
  plain = subject.model.build(Job("none", None).slots())
  whole = question_programs.generator_of(plain, subject.model, asked, 3)
  prompts = question_programs.pack(whole, asked, 3).prompts
  looks = visual_tokens.attention(
    subject.model.config, subject.model.params, prompts
  )
  assert looks.shape == (3, 3, 16) and (looks.sum(axis=-1) < 1).all()
  best = np.argsort(-looks[1], axis=-1)
  for remains, order in zip(stages[0].remains, best, strict=True):
    # The class token of the image competes, too.
    kept = set(np.flatnonzero(remains).tolist())
    assert kept == set(order[: len(kept)].tolist()) and len(kept) in (8, 9)


def test_what_comes_back_as_copies_remains(tmp_path):
  """DyMU's encoder merges, its language model computes members once."""
  subject = sweep.load(config()).prepare(tmp_path)
  asked = subject.model.asked[:2]
  stages = question_views.stages_of(subject.model, Job("dymu", 0.75), asked)
  assert [s.name for s in stages] == ["vision, block 1", "language, block 1"]
  merged, inside = (s.groups((4, 4)) for s in stages)
  assert all(s.remains.all() for s in stages)
  np.testing.assert_array_equal(merged.num_tokens, inside.num_tokens)
  for a, b in zip(merged.index, inside.index, strict=True):
    same = lambda x: x.reshape(-1, 1) == x.reshape(1, -1)
    np.testing.assert_array_equal(same(a), same(b))


def test_a_file_of_questions(tmp_path, monkeypatch):
  """A published model, its tokenizer and preprocessing are used."""
  subject = sweep.load(config()).prepare(tmp_path)
  words, data = subject.model.tokenizer, sweep.load(config()).subject.train.data
  model = subject.model.build(Job("none", None).slots())
  inputs = types.SimpleNamespace(
    tokenizer=words, preprocessing=data.preprocessing
  )
  monkeypatch.setattr(question_models.zoo, "resolve", lambda name: name)
  monkeypatch.setattr(
    interop, "load", lambda *a, **k: (model, subject.model.params, inputs)
  )
  Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
  line = dict(image="a.png", question="how many show 3?", answer="2")
  path = tmp_path / "asked.jsonl"
  path.write_text(json.dumps(line) + "\n\n" + json.dumps({**line, "kind": "x"}))
  published = vlm_pareto.get_config(f"checkpoint=tiny,questions={path}").subject
  published.template = "<image> {question}"
  made = sweep.load(config(subject=published)).prepare(tmp_path)
  one, two = made.model.asked
  assert (one.question.kind, two.question.kind) == ("all", "x")
  assert one.prompt == words.encode("<image> how many show 3?")
  assert one.image.shape == (32, 32, 3)
  for text, message in (
    ("", "has no question"),
    ("{", "line 1: is not JSON"),
    ('{"image": "a.png"}', 'an object with "image", "question" and "answer"'),
    (json.dumps({**line, "image": "b.png"}), "b.png' cannot be read"),
  ):
    path.write_text(text)
    with pytest.raises(typed.ConfigError, match=message):
      published_again = sweep.load(config(subject=published))
      published_again.prepare(tmp_path)


def test_bad_settings_are_refused():
  with pytest.raises(ValueError, match="give both"):
    vlm_pareto.get_config("checkpoint=x")
  for changes, message in (
    (dict(answer=0), "answer=0"),
    (dict(steps=0), "steps=0"),
    (dict(options={"fastv": {"depth": 1}}), "'depth' must be one of"),
  ):
    with pytest.raises(typed.ConfigError, match=message):
      sweep.load(config(**changes)).methods()


def test_a_combination_takes_part(tmp_path):
  found = vlm_budget.get_config("runlocal")
  found.rounds = 1
  results = sweep.main(found, tmp_path)
  names = {row["method"] for row in results.reduced}
  assert names == {"divprune", "snapkv", "divprune^1/2+snapkv^1/2"}
  rows = {row["method"]: row for row in results.reduced}
  # Half in all: less before the language model than with half there alone.
  pair = rows["divprune^1/2+snapkv^1/2"]
  assert pair["image_tokens"] > rows["divprune"]["image_tokens"]
  assert pair["gflops"] > rows["divprune"]["gflops"]
  assert pair["gflops"] < rows["snapkv"]["gflops"]
  assert len(pair["right"]) == 1 and set(pair["right"][0]) <= set("01")
  lines = question_budget.verdicts(results)
  assert lines and all("points, divprune^1/2+snapkv^1/2" in x for x in lines)
