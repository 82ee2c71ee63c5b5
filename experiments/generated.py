"""What generation gave, for people and for programs."""

import dataclasses
import json
import math


@dataclasses.dataclass(frozen=True)
class Generated:
  """What came of a prompt.

  Attributes:
    text, ids: without the prompt.
    first: seconds to the first token, compilation apart.
    rate: tokens per second after the first, of all prompts taken together.
    compiled: seconds of compilation.
    logical, physical: bytes of the cache after the prompt: what counts, and
      what is allocated.
    full: bytes of the full cache for the same prompt and answer, allocated.
    prompt: as it was given.
    read: tokens of the prompt.
    stopped: why it ended: "end" (a token), "stop" (a string), "length".
    action: what the tokens of a model of actions stand for; (): it is none.
    per_step: tokens that a step of the model gave; None: one, without a draft.
  """

  text: str
  ids: tuple[int, ...]
  first: float
  rate: float
  compiled: float
  logical: float
  physical: int
  full: int
  prompt: str = ""
  read: int = 0
  stopped: str = "length"
  action: tuple[float, ...] = ()
  per_step: float | None = None

  def report(self) -> str:
    """Two lines for people, below a line with the action if there is one."""
    share = self.physical / self.full
    rate = "-" if math.isnan(self.rate) else f"{self.rate:.1f}"
    action = " ".join(f"{x:.4g}" for x in self.action)
    steps = "" if self.per_step is None else f", {self.per_step:.2f} a step"
    return (
      f"{f'action: {action}' + chr(10) if action else ''}"
      f"time to first token {1e3 * self.first:.1f} ms, {rate} tokens/s{steps}"
      f" (compiled in {self.compiled:.1f} s)\n"
      f"cache {size(self.physical)} allocated, {size(self.logical)} used; full"
      f" cache {size(self.full)}: {share:.1%}"
    )

  def record(self, origin: str, recipe: str) -> str:
    """One line of JSON for programs."""
    return json.dumps(
      {
        "prompt": self.prompt,
        "text": self.text,
        "stopped": self.stopped,
        "ids": list(self.ids),
        **({"action": list(self.action)} if self.action else {}),
        "prompt_tokens": self.read,
        "model": origin,
        "recipe": recipe,
        "seconds_to_first_token": self.first,
        "tokens_per_second": None if math.isnan(self.rate) else self.rate,
        **({} if self.per_step is None else {"tokens_per_step": self.per_step}),
        "compile_seconds": self.compiled,
        "cache_bytes": {
          "allocated": self.physical, "used": self.logical, "full": self.full,
        },
      },
      ensure_ascii=False,
    )  # fmt: skip


def size(count: float) -> str:
  """Bytes for people."""
  for unit in ("B", "KiB", "MiB"):
    if count < 1024:
      return f"{count:.4g} {unit}"
    count /= 1024
  return f"{count:.4g} GiB"
