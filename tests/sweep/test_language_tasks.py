"""Questions to models of text: what stands in them, and how they are judged."""

import collections
import dataclasses
import json
import re

import numpy as np
import pytest

from experiments.data.errors import DataError
from experiments.sweeps import probes, task_files, text_tasks
from experiments.sweeps.probe import NOTHING, OWN, Grid, Probe
from tests.experiments.test_recall import DATA, Digits

TEXT = b"some words of a longer text about other things " * 60
FULL = Grid(
  (120,), (0.5,), 1, 3, 1, turns=3, also_known=1, values=1, tracking=1, words=1
)


@pytest.fixture(scope="module")
def made():
  tokenizer = Digits()
  found = probes.of_text(tokenizer, TEXT, FULL)
  return tokenizer, {probe.task: probe for probe in found}


def test_every_task_fits_its_length(made):
  tokenizer, found = made
  assert set(found) == {
    "single", "keys", "known", "values", "tracking", "words"
  }  # fmt: skip
  for probe in found.values():
    assert 0.7 * 120 < len(probe.prompt) <= 120
    assert len(probe.asked) == len(probe.answer)
    if not probe.wanted:
      assert probe.share_of(np.array(probe.answer)) == 1


def test_several_questions_about_one_context_are_judged_one_by_one(made):
  """Three keys in turn; the answers before are fed."""
  tokenizer, found = made
  probe = found["keys"]
  fed = tokenizer.decode(probe.asked)
  assert fed.count("Answer") == 3
  numbers = re.findall(r"\d{5}", fed)[:2]
  assert all(number in tokenizer.decode(probe.prompt) for number in numbers)
  answer = np.array(probe.answer)
  first = np.flatnonzero(answer >= 0)[0]
  wrong = answer.copy()
  wrong[first] = 0
  assert probe.share_of(wrong) == pytest.approx(2 / 3)


def test_all_facts_stand_in_one_context_that_every_question_is_about():
  tokenizer, length = Digits(), 400
  grid = Grid((length,), (0.0, 1.0), 0, 3, 0, turns=2, together=2)
  found = probes.of_text(tokenizer, TEXT, grid)
  assert [probe.task for probe in found] == 2 * [
    "single", "single", "keys", "values", "tracking"
  ]  # fmt: skip
  first, second = found[:5], found[5:]
  assert {tuple(probe.prompt) for probe in first} == {tuple(first[0].prompt)}
  assert first[0].prompt != second[0].prompt
  assert len(first[0].prompt) == length
  context = tokenizer.decode(first[0].prompt)
  for probe in first:
    fed = tokenizer.decode([*probe.asked, probe.answer[-1]])
    said = fed[fed.index("Answer: ") :]
    assert probe.share_of(np.array(probe.answer)) == 1
    if probe.task in ("single", "keys"):
      for sentence in said.split("\nAnswer: "):
        assert sentence.removeprefix("Answer: ") in context
    else:
      names = re.findall(r"\d{5}|\b[A-Z][a-z]+\b", said.split(" are")[1])
      assert all(name in context for name in names) and len(names) == 3
  assert context.startswith("\nThe secret number")  # at depth 0
  assert re.search(r"secret number of \w+ is \d{5}\.\n$", context)
  few = dataclasses.replace(grid, tasks=("tracking", "keys"), together=1)
  found = probes.of_text(tokenizer, TEXT, few)
  assert [probe.task for probe in found] == ["tracking", "keys"]
  assert "secret numbers" not in tokenizer.decode(found[0].prompt)
  with pytest.raises(ValueError, match="tasks=.*: must be one or more, each"):
    dataclasses.replace(grid, tasks=())
  with pytest.raises(ValueError, match="tasks=.*: 'single' needs depths"):
    dataclasses.replace(grid, depths=(), tasks=("single",))
  with pytest.raises(ValueError, match=r"grid.together=1: needs 18 names"):
    probes.of_text(tokenizer, TEXT, Grid((length,), pairs=9, together=1))
  with pytest.raises(ValueError, match="together=1: .*take known=False"):
    Grid(known=True, together=1)
  with pytest.raises(ValueError, match="40 tokens are too few for .*, 130;"):
    probes.of_text(tokenizer, TEXT, Grid((40,), (0.5,), 0, 3, 0, together=1))
  with pytest.raises(ValueError, match="texts=0, several=0: nothing is asked"):
    Grid(texts=0, several=0)


def test_values_and_chains_name_all_that_belongs(made):
  tokenizer, found = made
  context = tokenizer.decode(found["values"].prompt)
  (name,) = set(re.findall(r"number of (\w+)", context))
  numbers = re.findall(r"\d{5}", context)
  asked = tokenizer.decode(found["values"].asked)
  assert name in asked and all(x in asked for x in numbers[:-1])
  chain = tokenizer.decode(found["tracking"].prompt)
  (value,) = re.findall(r"\d{5}", chain)
  first, second, third = re.findall(r"variable (\w+) has", chain)
  assert f"{second} has the value of {first}." in chain
  assert f"{third} has the value of {second}." in chain
  asked = tokenizer.decode(found["tracking"].asked)
  assert f"value {value} are {first}, {second}" in asked


def test_common_words_are_those_that_stand_most_often():
  tokenizer = Digits()
  letters = "abcdefghi"
  text = " ".join(f"word{i}{j}" for i in letters for j in letters)
  grid = Grid((600,), (), 1, 2, 0, words=1)
  (probe,) = probes.of_text(tokenizer, text.encode(), grid)
  words = tokenizer.decode(probe.prompt).replace(" ", "").split(",")
  most = collections.Counter(words).most_common(3)
  assert {word for word, _ in most} == set(probe.wanted)
  assert list(probe.asked).count(OWN) == text_tasks.STEPS


def test_a_question_that_is_known_stands_in_the_prompt(made):
  tokenizer, found = made
  assert "Answer" in tokenizer.decode(found["known"].prompt)
  assert "Answer" not in tokenizer.decode(found["single"].prompt)


def test_generated_text_is_judged_by_what_it_contains():
  class Words:
    decode = staticmethod(lambda ids: " ".join("abcdefg"[i] * 3 for i in ids))

  asked = [5, 5, OWN, OWN]
  wanted = ("BBB.", "the ddd")
  probe = Probe([1], asked, [NOTHING] * 4, 1, -1.0, 2, wanted=wanted)
  token = np.array([0, 1, 2, 3])
  # What was answered to the last token that was fed, and from then on.
  assert probe.generated(token) == [1, 2, 3]
  assert probe.share_of(token, Words) == 1
  assert probe.share_of(np.array([3, 1, 2, 2]), Words) == 0.5
  either = probe._replace(alternatives=True)
  assert either.share_of(np.array([3, 1, 2, 2]), Words) == 1
  some = probe._replace(judge="f1", wanted=("bbb ccc", "ggg"))
  assert some.share_of(token, Words) == pytest.approx(2 * 2 / 5)


def lines(path, *rows):
  said = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  path.write_text("\n".join(said))
  return str(path)


def test_files_of_longbench_and_ruler(tmp_path, capsys):
  tokenizer = Digits()
  path = lines(
    tmp_path / "qa.jsonl",
    {
      "input": "Who?", "context": "It was Ann that day",
      "answers": ["Ann", "A."],
    },
    "",
    {"input": "word " * 50, "outputs": ["x"]},
    {"input": "Numbers 1 2 . They are", "outputs": ["1", "2"]},
  )
  grid = Grid(files=(path,), longest=20, steps=3)
  one, two = task_files.probes_of(path, tokenizer, grid)
  assert "1 prompts of more than 20 tokens left out" in capsys.readouterr().out
  assert one.task == "qa" and one.alternatives and not two.alternatives
  assert tokenizer.decode(one.prompt) == "It was Ann that day"
  assert "Who?" in tokenizer.decode([i for i in one.asked if i != OWN])
  assert list(one.asked).count(OWN) == 3
  assert tokenizer.decode(two.prompt) == "Numbers 1 2 . They"
  assert two.wanted == ("1", "2")
  known = Grid(files=(path,), known=True, limit=1)
  (probe,) = task_files.probes_of(path, tokenizer, known)
  assert "Who?" in tokenizer.decode(probe.prompt)


@pytest.mark.parametrize(
  "row, message",
  [
    ("{", "qa.jsonl:2: is no JSON"),
    ("[1]", "qa.jsonl:2: must be an object"),
    ({"answers": ["a"]}, "2: has neither 'input' nor 'context'"),
    ({"input": 3, "answers": ["a"]}, "2: 'input' must be a text, not 3"),
    ({"input": "a"}, "2: must have one of 'answers' and 'outputs'"),
    ({"input": "a", "outputs": "b"}, "2: 'outputs' must be a list of texts"),
  ],
)
def test_a_bad_line_is_named(tmp_path, row, message):
  path = lines(tmp_path / "qa.jsonl", {"input": "a b", "outputs": ["b"]}, row)
  with pytest.raises(DataError, match=re.escape(message)):
    task_files.probes_of(path, Digits(), Grid(files=(path,)))


def test_files_that_give_nothing_are_refused(tmp_path):
  with pytest.raises(DataError, match="cannot be read"):
    task_files.probes_of(str(tmp_path / "no"), Digits(), Grid())
  with pytest.raises(DataError, match="is empty"):
    task_files.probes_of(lines(tmp_path / "e"), Digits(), Grid())
  path = lines(tmp_path / "l", {"input": "a b c d", "outputs": ["b"]})
  with pytest.raises(DataError, match="at most 2 tokens; raise grid.longest"):
    task_files.probes_of(path, Digits(), Grid(longest=2))


def test_models_of_recall_are_not_asked_about_text():
  with pytest.raises(ValueError, match="grid.tracking: needs a model of text"):
    probes.of_recall(DATA, Grid(tracking=1))
  with pytest.raises(ValueError, match="turns=9: there are pairs=8"):
    Grid(turns=9)
  assert text_tasks.HOPS <= len(text_tasks.NAMES)
