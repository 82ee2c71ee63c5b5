"""Prompts shortened after a layer: GemFilter and PromptDistill."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cache import cases
from tests.cache.reference import layer_input
from tests.cache.reference.layer_input import best, half
from tokjax import recipes
from tokjax.models.decoder_answers import DecoderAnswers
from tokjax.reduce.stages import Sequence, asked, plan_stages
from tokjax.signals import Answers
from tokjax.tokens import Kind, Tokens

DEPTH = 4


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


def stages_of(name, keep):
  """The stages of prompts of the shared length, in a model of some blocks."""
  slots = recipes.get(name, keep=keep, layer=0, kernel=3)
  sequence = Sequence(((Kind.TEXT, cases.PROMPT),), cases.PROMPT)
  return plan_stages(slots.reduce, sequence, DEPTH, recipe=name)


def planned(stage, questions):
  """The plans of the shared prompts after block 0."""
  arrivals = cases.TEXT.prompt(0, 0, cases.PROMPT)
  lengths = jnp.asarray(cases.LENGTHS)

  def run(arrivals):
    b, n = arrivals.valid.shape
    tokens = Tokens(
      jnp.zeros((b, n, 1)), jnp.ones((b, n)),
      arrivals.position[..., None].astype(jnp.float32),
      jnp.full((b, n), Kind.TEXT, jnp.int32), arrivals.valid,
    )  # fmt: skip
    layer = dataclasses.replace(cases.layers()[0], depth=DEPTH)
    block = DecoderAnswers(layer, arrivals.clean(), tokens, Answers())
    answers = block.add_to(Answers(), questions)
    return stage.plan(tokens, answers, due=stage.due(lengths, lengths))[0]

  return jax.jit(run)(arrivals)


@pytest.mark.parametrize("name", ["gemfilter", "promptdistill"])
def test_the_last_query_chooses(name):
  stages = stages_of(name, 0.5)
  assert [len(block) for block in stages] == [1, 0, 0, 0]
  ((stage,), *_), (questions, *_) = stages, asked(stages, DEPTH)
  plan = planned(stage, questions)
  last = name == "promptdistill"
  assert plan.anchor.shape[1] == half(cases.PROMPT) + last
  for b in range(len(cases.LENGTHS)):
    s = layer_input(cases.case("full"), b, 0, {})
    kept = np.asarray(plan.anchor[b])[np.asarray(plan.valid[b])]
    assert kept.tolist() == expected(s, last)


def test_keeping_everything_keeps_the_order():
  assert stages_of("gemfilter", 1.0) == ((),) * DEPTH, "nothing to carry out"
  stage = dataclasses.replace(
    stages_of("gemfilter", 0.5)[0][0], keep=cases.PROMPT, room=cases.PROMPT,
    reduce=recipes.get("gemfilter", keep=1.0, layer=0).reduce[0],
  )  # fmt: skip
  plan = planned(stage, asked(((stage,),), DEPTH)[0])
  for b, n in enumerate(cases.LENGTHS):
    assert plan.anchor[b, :n].tolist() == list(range(n))
    assert plan.valid[b].sum() == n
