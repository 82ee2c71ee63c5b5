"""Answers to whatever a recipe asks, from arrays named by what they are."""

import jax.numpy as jnp

from tokjax import signals
from tokjax.reduce.reduction import Reduce
from tokjax.signals import Answers

NAMES = {
  signals.Keys: "keys",
  signals.Queries: "queries",
  signals.Values: "values",
  signals.Attention: "attention",
  signals.Received: "received_attention",
  signals.Rows: "class_attention",
}


def answers_of(reduce: Reduce, layer: int, depth: int, **arrays) -> Answers:
  """Batched answers to the questions of a recipe's rule."""
  answers = Answers()
  for question in reduce.asks:
    if isinstance(question, signals.OF_THE_CALL):
      continue
    value = jnp.asarray(arrays[NAMES[type(question)]])
    at = question.at(layer, depth)
    answers = answers.add(question.answered(at), value)
  return answers
