"""Questions in JSON lines, in the format of LongBench or RULER.

One object a line:

    {"input": QUESTION, "context": TEXT, "answers": [ONE, OR, ANOTHER]}
    {"input": TEXT AND QUESTION, "outputs": [ALL, OF, THESE]}

`answers` are alternatives, `outputs` are all wanted. With a `context` the
question is fed after the prompt, unless the grid says that it is known; without
one it is the end of the prompt. Other fields are not read.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from experiments.data.errors import DataError
from experiments.sweeps.probe import NOTHING, OWN, Grid, Probe

QUESTION = "\nQuestion: {input}\nAnswer:"


def probes_of(path: str, tokenizer: Any, grid: Grid) -> list[Probe]:
  """The first `grid.limit` questions whose prompt is not too long.

  Raises:
    DataError: the file cannot be read, a line of it is bad (the message has
      its number), or all prompts are too long.
  """
  found, longer = [], 0
  task = pathlib.Path(path).stem
  for row in _rows(pathlib.Path(path)):
    if len(found) == grid.limit:
      break
    probe = _probe(task, row, tokenizer, grid)
    if len(probe.prompt) > grid.longest:
      longer += 1
    else:
      found.append(probe)
  if longer:
    most = grid.longest
    print(f"{path}: {longer} prompts of more than {most} tokens left out")
  if not found:
    raise DataError(
      f"{path}: no question with a prompt of at most {grid.longest} tokens;"
      " raise grid.longest"
    )
  return found


def _rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Objects of the lines, checked."""
  try:
    lines = path.read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f"{path}: cannot be read ({error})") from error
  if not any(line.strip() for line in lines):
    raise DataError(f"{path}: is empty")
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise DataError(f"{path}:{number}: is no JSON ({error})") from error
    if problem := _problem(row):
      raise DataError(f"{path}:{number}: {problem}")
    yield row


def _problem(row: Any) -> str | None:
  """What is wrong with an object; None: nothing."""
  if not isinstance(row, dict):
    return f"must be an object, not {type(row).__name__}"
  for name in ("input", "context"):
    if not isinstance(row.get(name, ""), str):
      return f"{name!r} must be a text, not {row[name]!r}"
  if not row.get("input", "").strip() and not row.get("context", "").strip():
    return "has neither 'input' nor 'context'"
  given = [name for name in ("answers", "outputs") if name in row]
  if len(given) != 1:
    return f"must have one of 'answers' and 'outputs', has {given or 'none'}"
  wanted = row[given[0]]
  texts = isinstance(wanted, list) and wanted
  if not texts or not all(isinstance(x, str) and x.strip() for x in wanted):
    return f"{given[0]!r} must be a list of texts, not {wanted!r}"
  return None


def _probe(task: str, row: dict[str, Any], tokenizer: Any, grid: Grid) -> Probe:
  """What is fed before the model goes on by itself is at least one id."""
  question, context = row.get("input", ""), row.get("context", "")
  if context:
    prompt = tokenizer.encode(context)
    asked = tokenizer.encode(QUESTION.format(input=question))
  else:
    prompt, asked = [], tokenizer.encode(question)
  if grid.known or not prompt:
    prompt, asked = [*prompt, *asked[:-1]], asked[-1:]
  # A prompt has one token at least.
  prompt = prompt or asked
  asked = [*asked, *[OWN] * grid.steps]
  wanted = row.get("answers") or row["outputs"]
  return Probe(
    prompt, asked, [NOTHING] * len(asked), len(prompt), -1.0, 1, task=task,
    wanted=tuple(wanted), judge=grid.judge, alternatives="answers" in row,
  )  # fmt: skip
