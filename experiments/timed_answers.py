"""Answers as a stream of tokens gives them, and how long they take."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from experiments.drafted import Stream
from experiments.prompts import Answer
from tokjax.slots import Bytes

Show = Callable[[str], Any]


def warm_up(stream: Stream, *inputs: Any) -> tuple[float, Bytes]:
  """Runs both compiled functions once: seconds, and sizes of the cache."""
  began = time.perf_counter()
  made = stream.generator
  sizes = made.bytes(made.prefill(*inputs))
  for _ in zip(stream(*inputs), range(2), strict=False):
    pass
  return time.perf_counter() - began, sizes


def run(
  stream: Stream, answers: Sequence[Answer], show: Show | None, *inputs: Any
) -> tuple[float, float]:
  """Fills the answers; seconds to the first token, tokens per second.

  Args:
    stream: of tokens.
    answers: empty ones that end alike, one for each prompt.
    show: is given the text piece by piece; None: nobody is.
    *inputs: of the stream.
  """
  show, times, later = show or (lambda text: None), [], 0
  began = time.perf_counter()
  for tokens in stream(*inputs, ends=answers[0].ends):
    times.append(time.perf_counter() - began)
    for one, token in zip(answers, tokens, strict=True):
      if token >= 0 and not one.done:
        later += len(times) > 1
        show(one.add(int(token)))
    sys.stdout.flush()
    if all(one.done for one in answers):
      break
  show(answers[-1].rest())
  rate = later / (times[-1] - times[0]) if len(times) > 1 else math.nan
  return times[0], rate
