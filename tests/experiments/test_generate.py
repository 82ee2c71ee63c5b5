"""`experiments.generate` from end to end, with a model of two steps."""

import dataclasses
import json

import pytest

from configs import generate as generate_config
from experiments import generate, prompts
from tokjax import zoo


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
    run(workdir, "recipe=snapkv,keep=0.4,window=64", prompt)
  done, _ = run(workdir, "recipe=snapkv,keep=0.4,window=2,kernel=3", prompt)
  assert done.physical < done.full
  with pytest.raises(ValueError, match="unknown option 'windw'"):
    run(workdir, "recipe=snapkv,windw=2", prompt)


def test_a_window_that_is_too_large_is_made_smaller(workdir, capsys):
  """Prompts of up to 32 tokens, of which 12 stay; no window was asked for."""
  done, _ = run(workdir, "recipe=snapkv,keep=0.4", "import os, sys\n")
  assert done.physical < done.full
  (note,) = [x for x in capsys.readouterr().err.split("\n") if "note" in x]
  assert "window=4 instead of window=64" in note


@pytest.mark.parametrize(
  "prompt, message",
  [("", "is empty"), ("x" * 33, "33 tokens, the capacity is 32")],
)
def test_bad_prompts(workdir, prompt, message):
  with pytest.raises(ValueError, match=message):
    run(workdir, "", prompt)


@pytest.mark.parametrize(
  "arg, prompt, message",
  [
    ("recipe=tome", "import os", "tome"),
    (
      "recipe=snapkv,keep=0.4,window=64", "import os, sys\n",
      "that are protected",
    ),
    ("", "x" * 33, "33 tokens, the capacity is 32"),
  ],
)
def test_nothing_is_trained_for_what_cannot_be(arg, prompt, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    run(tmp_path, arg, prompt)
  assert not list(tmp_path.iterdir())


PROMPTS = ("import os", "def f(x, y):", "x = 1")


def test_prompts_of_a_file_are_taken_together(workdir, tmp_path):
  """Three in batches of two: each as if it were alone."""
  path = tmp_path / "prompts.txt"
  path.write_text("\n".join([*PROMPTS[:2], "", PROMPTS[2]]))
  pieces = []
  config = generate_config.get_config("runlocal")
  config.batch = 2
  out = generate.main(config, workdir, show=pieces.append, prompts=path)
  assert [one.prompt for one in out] == list(PROMPTS)
  for one in out:
    alone, _ = run(workdir, "", one.prompt)
    assert one.ids == alone.ids and one.text == alone.text
    assert one.read == len(one.prompt) and 0 < one.physical <= one.full
  shown = "".join(pieces)
  assert f"> {PROMPTS[0]}\n{out[0].text}\n" in shown and "tokens/s" in shown


def test_json_is_all_that_is_shown(workdir, tmp_path):
  path = tmp_path / "prompts.jsonl"
  path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
  pieces = []
  config = generate_config.get_config("runlocal,recipe=random_kv,keep=0.25")
  out = generate.main(
    config, workdir, show=pieces.append, prompts=path, as_json=True
  )
  records = [json.loads(piece) for piece in pieces]
  assert len(records) == len(out) == 3
  for record, one, prompt in zip(records, out, PROMPTS, strict=True):
    assert record["prompt"] == prompt and record["text"] == one.text
    assert record["recipe"] == "random_kv" and record["ids"] == list(one.ids)
    assert record["cache_bytes"]["allocated"] < record["cache_bytes"]["full"]
    assert record["tokens_per_second"] > 0


def test_a_stop_string_ends_the_text(workdir):
  done, _ = run(workdir, "", "import os", tokens=8)
  # A character that is not the first one, and was not there before.
  text = done.text
  stop = next(c for i, c in enumerate(text) if i and c not in text[:i])
  cut, shown = run(workdir, "", "import os", stop=(stop,))
  assert cut.text == done.text[: done.text.index(stop)]
  assert cut.stopped == "stop" and len(cut.ids) < len(done.ids)
  assert shown.startswith(cut.text + "\n") and stop not in shown.split("\n")[0]
  with pytest.raises(ValueError, match="must not be empty"):
    run(workdir, "", "import os", stop=("",))


def test_what_a_prompt_cannot_be(workdir, tmp_path):
  with pytest.raises(ValueError, match="has no chat template"):
    run(workdir, "", "hello", chat=True)
  path = tmp_path / "prompts.jsonl"
  for text, message in (
    ("\n \n", "has no prompt"),
    ("{", "line 1: is not JSON"),
    ('{"prompt": "a"}\n{"prompt": 3}', "line 2: must be an object with"),
    ('{"messages": [{"role": "user"}]}', "line 1: must be an object with"),
    ("[1]", "line 1: must be an object with"),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
      prompts.read(path)
  path.write_bytes(b"\xff\n")
  with pytest.raises(ValueError, match="is not UTF-8"):
    prompts.read(path)
  with pytest.raises(ValueError, match="give one of the two"):
    config = generate_config.get_config("runlocal")
    generate.main(config, workdir, "a", prompts=path)


def test_conversations_of_a_file(tmp_path):
  path = tmp_path / "talk.jsonl"
  messages = [dict(role="user", content="a"), dict(role="user", content="b")]
  path.write_text(json.dumps({"messages": messages}))
  (one,) = prompts.read(path)
  assert one.text == "b" and list(one.messages) == messages

  class Taught:
    def encode_chat(self, given):
      return [len(given), *(len(m["content"]) for m in given)]

  assert one.encode(Taught(), chat=False) == [2, 1, 1]
  assert prompts.Prompt("abc").encode(Taught(), chat=True) == [1, 3]


def spelled(ids):
  return bytes(ids).decode(errors="replace")


def test_text_that_may_begin_a_stop_string_is_held_back():
  answer = prompts.Answer(spelled, ends=(0,), stops=("<end>", "\n\n"))
  shown = [answer.add(byte) for byte in b"a<e<en\n"]
  assert shown == ["a", "", "", "<e", "", "", "<en"]
  assert answer.add(ord("b")) == "\nb" and not answer.done
  assert [answer.add(byte) for byte in b"<end>"] == [""] * 5
  assert answer.done and answer.stopped == "stop"
  assert answer.text == "a<e<en\nb" and answer.rest() == ""


def test_characters_are_shown_whole_and_an_end_is_told():
  answer = prompts.Answer(spelled, ends=(0,))
  assert [answer.add(byte) for byte in "é".encode()] == ["", "é"]
  assert answer.add(0) == "\0" and answer.stopped == "end"
  cut = prompts.Answer(spelled)
  assert cut.add(0xC3) == "" and cut.rest() == "\ufffd"


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A cache in which SmolLM2 may be put, of a size that is not its own."""
  model = zoo.MODELS["smollm2"]
  monkeypatch.setenv("TOKJAX_CACHE", str(tmp_path))
  piece = dataclasses.replace(model.pieces[0], size=3)
  monkeypatch.setitem(
    zoo.MODELS, "smollm2", dataclasses.replace(model, pieces=(piece,))
  )
  return tmp_path / "models" / "smollm2" / model.file


def test_which_model_is_taken(cache):
  get = lambda arg="": generate_config.get_config(arg).language_model
  assert get().name == "trained"
  cache.parent.mkdir(parents=True)
  cache.write_text("abc")
  # Whether its packages are installed or not: reading it says so.
  assert get().checkpoint == "smollm2"
  assert get("model=bytes").name == get("runlocal").name == "trained"
  assert get("model=gemma3-270m").checkpoint == "gemma3-270m"
  assert get("checkpoint=a/b").checkpoint == "a/b"
  with pytest.raises(ValueError, match="must be one of smollm2"):
    get("model=gpt5")
  with pytest.raises(ValueError, match="give one of the two"):
    get("model=bytes,checkpoint=a/b")


def test_nothing_is_downloaded_without_consent(cache, monkeypatch):
  asked = []

  def fetch(name):
    asked.append(name)
    cache.parent.mkdir(parents=True)
    cache.write_text("abc")

  monkeypatch.setattr(generate.zoo, "get", fetch)
  config = generate.load(generate_config.get_config("runlocal"))
  assert generate.chosen(config, None, yes=False) == config
  with pytest.raises(zoo.FetchError, match="tokjax models get smollm2"):
    generate.chosen(config, "smollm2", yes=False)
  assert not asked
  taken = generate.chosen(config, None, yes=True)
  assert asked == ["smollm2"] and taken.language_model.checkpoint == "smollm2"
  assert generate.chosen(config, "smollm2", yes=False) == taken
  other = generate.chosen(config, "owner/name", yes=True)
  assert other.language_model.checkpoint == "owner/name" and len(asked) == 1
