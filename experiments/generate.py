"""Text from a prompt, with any recipe, and what it costs.

python -m experiments.generate --config configs/generate.py --prompt "def "
python -m experiments.generate --config configs/generate.py:recipe=snapkv ...
python -m experiments.generate --config configs/generate.py:checkpoint=NAME ...

Streams the text, then prints time to first token, tokens per second and the
bytes of the cache, compared with the full cache. Without a checkpoint a small
model is trained first, once for each workdir.
"""

import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import jax
import numpy as np

from experiments import typed
from experiments.sweeps.carriers import CARRIERS, Carrier
from experiments.training.config import Recipe
from tokjax.models import Generator, Sampler, generation
from tokjax.slots import Slots


@dataclasses.dataclass(frozen=True)
class Generate:
  """What is generated.

  Attributes:
    carrier: the model; "trained" or "pretrained".
    recipe: fills its slots.
    prompt: text that is continued.
    tokens: the largest number of tokens to generate.
    capacity: the longest prompt, in tokens; None: the model's length.
    chunk: tokens of the prompt taken at a time; None: all.
    sampler: how tokens are drawn.
    seed: of the draws.
  """

  carrier: Annotated[Any, typed.OneOf(CARRIERS)]
  recipe: Recipe = Recipe()
  prompt: str = ""
  tokens: int = 128
  capacity: int | None = None
  chunk: int | None = None
  sampler: Sampler = Sampler()
  seed: int = 0

  def __post_init__(self):
    for name in ("tokens", "capacity", "chunk"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"{name}={value}: must be 1 or more")
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"seed={self.seed}: must be in [0, 2**32)")


@dataclasses.dataclass(frozen=True)
class Generated:
  """What came of it.

  Attributes:
    text, ids: without the prompt.
    first: seconds to the first token, compilation apart.
    rate: tokens per second after the first.
    compiled: seconds of compilation.
    logical, physical: bytes of the cache after the prompt: what counts, and
      what is allocated.
    full: bytes of the full cache for the same prompt and answer, allocated.
  """

  text: str
  ids: tuple[int, ...]
  first: float
  rate: float
  compiled: float
  logical: float
  physical: int
  full: int

  def report(self) -> str:
    """Two lines for people."""
    share = self.physical / self.full
    rate = "-" if math.isnan(self.rate) else f"{self.rate:.1f}"
    return (
      f"time to first token {1e3 * self.first:.1f} ms, {rate} tokens/s"
      f" (compiled in {self.compiled:.1f} s)\n"
      f"cache {size(self.physical)} allocated, {size(self.logical)} used; full"
      f" cache {size(self.full)}: {share:.1%}"
    )


def size(count: float) -> str:
  """Bytes for people."""
  for unit in ("B", "KiB", "MiB"):
    if count < 1024:
      return f"{count:.4g} {unit}"
    count /= 1024
  return f"{count:.4g} GiB"


def load(config: Any) -> Generate:
  """A `Generate` from a ConfigDict or mapping. See `typed.build`."""
  if isinstance(config, Generate):
    return config
  if hasattr(config, "to_dict"):
    config = config.to_dict()
  return typed.build(Generate, config)


def main(
  config: Any,
  workdir: str | pathlib.Path,
  prompt: str | None = None,
  show: Callable[[str], Any] = sys.stdout.write,
) -> Generated:
  """Generates as `config` says.

  Args:
    config: a `Generate` or what `load` takes.
    workdir: where a model is trained if none is given.
    prompt: instead of the config's.
    show: is given the text piece by piece, and the report.
  """
  config, workdir = load(config), pathlib.Path(workdir)
  config.recipe.slots()  # Refused before a model is trained or read.
  carrier = config.carrier.prepare(workdir)
  if carrier.tokenizer is None:
    raise ValueError(
      f"carrier: {carrier.origin} on {carrier.data} has no tokenizer; take one"
      " that was trained on text"
    )
  text = config.prompt if prompt is None else prompt
  ids = carrier.tokenizer.encode(text)
  made = build(carrier, config)
  made.pack([ids])
  compiled = warm_up(made, config, ids)
  out, first, rate = run(made, config, carrier, ids, show)
  going = made.prefill([ids])
  sizes = made.bytes(going)
  done = Generated(
    carrier.tokenizer.decode(out),
    tuple(out),
    first,
    rate,
    compiled,
    float(np.sum(sizes.logical)),
    sizes.physical,
    full_bytes(made, len(ids)),
  )
  show(f"\n\n{done.report()}\n")
  return done


def build(carrier: Carrier, config: Generate) -> Generator:
  """The carrier with the recipe's slots, and room."""
  model = carrier.build(config.recipe.slots())
  return Generator(
    model,
    carrier.params_for(model),
    capacity=carrier.config.length
    if config.capacity is None
    else config.capacity,
    decode=config.tokens,
    chunk=config.chunk,
  )


def warm_up(made: Generator, config: Generate, ids: Sequence[int]) -> float:
  """Runs both compiled functions once; returns the seconds that took."""
  began = time.perf_counter()
  for _ in zip(stream(made, config, ids), range(2), strict=False):
    pass
  return time.perf_counter() - began


def stream(
  made: Generator, config: Generate, ids: Sequence[int], ends=()
) -> Iterator[np.ndarray]:
  """Tokens `[1]` after the prompt."""
  key = jax.random.key(config.seed) if config.sampler.temperature else None
  going = made.prefill([ids])
  return made.stream(going, sampler=config.sampler, key=key, ends=ends)


def run(
  made: Generator,
  config: Generate,
  carrier: Carrier,
  ids: Sequence[int],
  show: Callable[[str], Any],
) -> tuple[list[int], float, float]:
  """Streams the text; returns ids, seconds to the first, tokens per second."""
  out, shown, times = [], "", []
  began = time.perf_counter()
  for token in stream(made, config, ids, carrier.tokenizer.ends):
    times.append(time.perf_counter() - began)
    out.append(int(token[0]))
    text = carrier.tokenizer.decode(out)
    # A character may need several tokens: until then it decodes to a mark.
    if not text.endswith("\ufffd"):
      show(text[len(shown) :])
      shown = text
    sys.stdout.flush()
  show(carrier.tokenizer.decode(out)[len(shown) :])
  rate = math.nan
  if len(times) > 1:
    rate = (len(times) - 1) / (times[-1] - times[0])
  return out, times[0], rate


def full_bytes(made: Generator, prompt: int) -> int:
  """Bytes of the full cache in place of the recipe's; nothing is computed."""
  model = made.model.clone(slots=Slots())
  shape = jax.ShapeDtypeStruct((1, made.bucket(prompt)), "int32")

  def states(params, tokens, length):
    going = generation.prefill(model, params, tokens, length, made.decode)
    return jax.tree.leaves(going.states)

  length = jax.ShapeDtypeStruct((1,), "int32")
  leaves = jax.eval_shape(states, made.params, shape, length)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


if __name__ == "__main__":
  from experiments import launch

  launch.generate(main)
