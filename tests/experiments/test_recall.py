"""Texts of associative recall: what is planted, where, and what is asked."""

import re

import numpy as np
import pytest

from experiments.data import Recall
from experiments.sweeps import probes

DATA = Recall(length=64, pairs=8, keys=16, values=16, fillers=15)


@pytest.mark.parametrize("pairs", [1, 5])
def test_pairs_stand_whole_at_their_depth(pairs):
  rng = np.random.default_rng(0)
  for depth in (0.0, 0.4, 1.0, None):
    text = DATA.text(rng, 21, pairs, depth)
    assert len(text.context) == 22 and text.context[-1] == 0
    np.testing.assert_array_equal(text.context[text.at], text.keys)
    np.testing.assert_array_equal(text.context[text.at + 1], text.values)
    assert len(set(text.keys)) == pairs
    noise = np.delete(text.context[:-1], [*text.at, *(text.at + 1)])
    assert (noise > 32).all() and len(noise) == 21 - 2 * pairs
    if pairs == 1 and depth is not None:
      assert text.at[0] == round(depth * 19)


def test_examples_ask_for_planted_values_only():
  element = DATA.prepare(DATA.source("test")[3])
  again = DATA.prepare(DATA.source("test")[3])
  np.testing.assert_array_equal(element["tokens"], again["tokens"])
  tokens, target = element["tokens"], element["target"]
  (separator,) = np.nonzero(tokens == 0)[0]
  assert (target[: separator + 1] == -1).all()
  for i in range(separator + 1, 64):
    (at,) = np.nonzero(tokens[:separator] == tokens[i])[0]
    assert target[i] == tokens[at + 1]


def test_only_order_tells_key_and_value():
  data = Recall(length=34, pairs=16, keys=16, values=1, fillers=1, ordered=True)
  element = data.prepare(data.source("test")[3])
  tokens, target = element["tokens"], element["target"]
  (separator,) = np.nonzero(tokens == 0)[0]
  assert separator % 2 == 0 and ((tokens > 0) & (tokens <= 16)).sum() == 33
  pairs = tokens[:separator].reshape(-1, 2)
  assert set(pairs[:, 1]) & set(pairs[:, 0])
  for asked, answer in zip(
    tokens[separator + 1 :], target[separator + 1 :], strict=True
  ):
    assert pairs[pairs[:, 0] == asked, 1].tolist() == [answer]


def test_probes_ask_what_the_context_holds():
  grid = probes.Grid(
    lengths=(16, 32), depths=(0.0, 1.0), texts=2, pairs=5, several=3
  )
  found = probes.of_recall(DATA, grid)
  assert len(found) == 2 * (2 * 2 + 3)
  for probe in found:
    context = list(probe.prompt)
    assert len(context) == probe.length + 1
    for asked, answer in zip(probe.asked, probe.answer, strict=True):
      if answer >= 0:
        assert context[context.index(asked) + 1] == answer
  single = [p for p in found if p.pairs == 1]
  assert [(np.array(p.answer) >= 0).sum() for p in single] == [1] * len(single)
  known = probes.of_recall(DATA, probes.Grid((16,), (0.0,), 1, 4, 0, True))
  assert list(known[0].prompt[-4:]) == list(known[0].asked)


def test_bad_options_are_named():
  with pytest.raises(ValueError, match="pairs=17"):
    Recall(pairs=17, keys=16)
  with pytest.raises(ValueError, match="least=64"):
    Recall(length=64, least=64)
  with pytest.raises(ValueError, match="hold 2"):
    DATA.text(np.random.default_rng(0), 5, 3)
  with pytest.raises(ValueError, match="each must hold"):
    probes.Grid(lengths=(4,))


class Digits:
  """Words and single digits; a number has a space of its own in front."""

  def __init__(self):
    self.words = [""]

  def encode(self, text):
    parts = re.findall(r" (?=\d)|\d|\s?[^\s\d]+|\s", text)
    self.words += [part for part in parts if part not in self.words]
    return [self.words.index(part) for part in parts]

  def decode(self, ids):
    return "".join(self.words[i] for i in ids)


@pytest.mark.parametrize("known", [False, True])
def test_a_needle_is_judged_by_its_whole_answer(known):
  """A model that gives the space and nothing else knows nothing."""
  tokenizer = Digits()
  grid = probes.Grid((60,), (0.5,), 2, 2, 2, known)
  found = probes.of_text(tokenizer, b"some words of a text " * 40, grid)
  assert len(found) == 4
  for probe in found:
    fed, answer = np.array(probe.asked), np.array(probe.answer)
    number = tokenizer.decode(answer[answer >= 0])
    assert re.fullmatch(r"\d{5}", number)
    text = tokenizer.decode([*probe.prompt, *probe.asked])
    assert number in tokenizer.decode(probe.prompt) and "Answer" in text
    # The space stands in front of the first digit, fed and not asked.
    first = int(np.argmax(answer >= 0))
    assert tokenizer.decode([fed[first]]) == " "
    right = np.where(answer >= 0, answer, 7)
    assert probe.share_of(right) == 1
    for at in np.flatnonzero(answer >= 0):
      missed = right.copy()
      missed[at] = 0
      assert probe.share_of(missed) == 0


def test_answers_of_recall_count_one_by_one():
  found = probes.of_recall(DATA, probes.Grid((16,), (), 1, 4, 1))
  (probe,) = found
  right = np.array(probe.answer)
  assert probe.share_of(right) == 1
  right[0] += 1
  assert probe.share_of(right) == 0.75
