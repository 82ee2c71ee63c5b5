"""Prompts shortened after a layer: GemFilter and PromptDistill."""

import jax
import numpy as np
import pytest

from tests.cache import cases
from tests.cache.reference import story
from tests.cache.reference.story import best, half
from tokjax import recipes
from tokjax.cache import PromptSelect


def expected(s, keep_last):
  """Chosen tokens of one example, kernel 3, half of the prompt."""
  end = s.n - 1
  score = np.zeros(s.n)
  for j in range(s.n):
    for h in range(cases.HEADS):
      g = h // (cases.HEADS // cases.GROUPS)
      score[j] += s.rq[end, h] @ s.rk[j, g]
  if keep_last:
    score[end] = 0
  pad = np.concatenate([[0], score, [0]])
  score = np.array([pad[j : j + 3].mean() for j in range(s.n)])
  if keep_last:
    return best(score[:end], min(half(s.n), end)) + [end]
  return best(score, half(s.n))


@pytest.mark.parametrize("name", ["gemfilter", "promptdistill"])
def test_the_last_query_chooses(name):
  select = recipes.get(name, keep=0.5, layer=0, kernel=3).prompt
  assert isinstance(select, PromptSelect)
  assert select.at(4) == 0
  layer = cases.layers()[0]
  plan = jax.jit(lambda a: select.plan(layer, a))(
    cases.TEXT.prompt(0, 0, cases.PROMPT)
  )
  assert plan.anchor.shape[1] == select.count(cases.PROMPT)
  for b in range(len(cases.LENGTHS)):
    s = story(cases.case("full"), b, 0, {})
    kept = np.asarray(plan.anchor[b])[np.asarray(plan.valid[b])]
    assert kept.tolist() == expected(s, name == "promptdistill")


def test_keeping_everything_keeps_the_order():
  select = recipes.get("gemfilter", keep=1.0, layer=0).prompt
  plan = select.plan(cases.layers()[0], cases.TEXT.prompt(0, 0, cases.PROMPT))
  for b, n in enumerate(cases.LENGTHS):
    assert plan.anchor[b, :n].tolist() == list(range(n))
    assert plan.valid[b].sum() == n
