"""The systems that are compared: each takes prompts and then gives tokens.

Libraries are imported where they are used: a system that is not measured need
not be installed.
"""

import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from scripts.against.case import Case


class System(Protocol):
  """A loaded model."""

  def prefill(self) -> Any:
    """The cache after the prompts, computed."""
    ...

  def tokens(self, cache: Any) -> Iterator[np.ndarray]:
    """Ids of all texts, `[b]`, step by step; the cache is used up."""
    ...

  def kept(self, cache: Any) -> float:
    """Entries of a key head that count: means over heads and prompts."""
    ...


class Skip(Exception):
  """A system that cannot be measured here, and why."""


class Tokjax:
  """This project, with a recipe."""

  def __init__(self, case: Case, recipe: str = "none", **options: Any):
    import jax

    from tokjax import interop, recipes
    from tokjax.models import Generator

    self._jax = jax
    model, params, _ = interop.load(
      case.checkpoint, slots=recipes.get(recipe, **options),
      dtype=case.precision, param_dtype=case.precision,
    )  # fmt: skip
    self._generator = Generator(
      model, params, capacity=case.length, decode=case.steps
    )
    self._prompts = case.prompts(model.config.vocabulary)
    self._most = case.steps

  def prefill(self) -> Any:
    return self._jax.block_until_ready(self._generator.prefill(self._prompts))

  def tokens(self, cache: Any) -> Iterator[np.ndarray]:
    return self._generator.stream(cache, most=self._most)

  def kept(self, cache: Any) -> float:
    layer = self._generator.model.layers[0]
    # Keys, values and a position.
    one = 2 * layer.head_dim * np.dtype(layer.dtype).itemsize + 4
    heads = layer.kv_heads * layer.depth
    logical = np.asarray(self._generator.bytes(cache).logical)
    return float(logical.mean()) / (one * heads)


class Transformers:
  """The reference implementation, with its dynamic cache and SDPA."""

  def __init__(self, case: Case, press: Any = None):
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    path = pathlib.Path(case.checkpoint)
    where = (path.parent, {"gguf_file": path.name})
    folder, options = where if path.is_file() else (path, {})
    load = transformers.AutoModelForCausalLM.from_pretrained
    self._model = load(
      str(folder), dtype=getattr(torch, case.precision), **options
    ).eval()
    self._torch, self._press = torch, press
    # kvpress reads the cache among the arguments.
    self._cache = transformers.DynamicCache
    prompts = case.prompts(self._model.config.vocab_size)
    ids = np.zeros((case.batch, case.length), np.int64)
    mask = np.zeros_like(ids)
    for row, real, prompt in zip(ids, mask, prompts, strict=True):
      row[-len(prompt) :], real[-len(prompt) :] = prompt, 1
    self._ids, self._mask = torch.tensor(ids), torch.tensor(mask)
    # Without padding there is nothing to mask.
    self._ragged = case.batch > 1
    self._steps = case.steps

  def prefill(self) -> Any:
    import contextlib

    place = (self._mask.cumsum(1) - 1).clamp(min=0)
    pressed = self._press and self._press(self._model)
    with self._torch.inference_mode(), pressed or contextlib.nullcontext():
      out = self._model(
        self._ids, attention_mask=self._mask if self._ragged else None,
        position_ids=place, past_key_values=self._cache(), use_cache=True,
        logits_to_keep=1,
      )  # fmt: skip
    return out.past_key_values, out.logits[:, -1]

  def tokens(self, cache: Any) -> Iterator[np.ndarray]:
    torch = self._torch
    past, logits = cache
    mask, place = self._mask, self._mask.sum(1, keepdim=True)
    for step in range(self._steps):
      token = logits.argmax(-1)
      yield token.numpy()
      if step + 1 == self._steps:
        return
      mask = torch.cat([mask, torch.ones_like(place)], dim=1)
      with torch.inference_mode():
        out = self._model(
          token[:, None], attention_mask=mask if self._ragged else None,
          position_ids=place + step, past_key_values=past, use_cache=True,
        )  # fmt: skip
      past, logits = out.past_key_values, out.logits[:, -1]

  def kept(self, cache: Any) -> float:
    past, _ = cache
    real = self._mask.float().mean().item()
    lengths = [layer.keys.shape[-2] for layer in past.layers]
    return float(np.mean(lengths)) * real


def kvpress(case: Case) -> System:
  """transformers with SnapKV of kvpress.

  Raises:
    Skip: it is not installed, or the prompts differ in length.
  """
  if case.batch > 1:
    raise Skip("kvpress compresses padding as if it were text: one prompt only")
  try:
    import kvpress as package
  except ImportError as error:
    raise Skip(f"kvpress is not installed: {error}") from error
  press = package.SnapKVPress(compression_ratio=1 - case.keep)
  return Transformers(case, press)


SYSTEMS = {
  "transformers": Transformers,
  "kvpress snapkv": kvpress,
  "tokjax": Tokjax,
  "tokjax snapkv": lambda case: Tokjax(case, "snapkv", keep=case.keep),
}
# Systems that an environment of their own may be needed for.
OWN = ("transformers", "kvpress snapkv")


def measure(case: Case) -> dict[str, Any]:
  """Times, memory and entries of one system, which is loaded here.

  Returns:
    "load" (seconds until the model is there), "cold" (from then to the first
    token, compilation included), then of a second pass "prefill", "first"
    (seconds to the first token), "decode" (seconds a further token), "peak"
    (MiB, resident, of this pass; None where the system does not tell) and
    "kept".

  Raises:
    Skip: the system cannot be measured here.
  """
  begin = time.perf_counter()
  system = SYSTEMS[case.system](case)
  loaded = time.perf_counter()
  tokens = system.tokens(system.prefill())
  next(tokens)
  cold = time.perf_counter()
  for _ in tokens:
    pass
  del tokens
  forgotten = forget_peak()
  start = time.perf_counter()
  cache = system.prefill()
  filled = time.perf_counter()
  kept = system.kept(cache)
  after = time.perf_counter()
  tokens = system.tokens(cache)
  next(tokens)
  first = time.perf_counter()
  count = sum(1 for _ in tokens)
  end = time.perf_counter()
  return {
    "load": loaded - begin,
    "cold": cold - loaded,
    "prefill": filled - start,
    "first": (filled - start) + (first - after),
    "decode": (end - first) / count,
    "peak": peak() if forgotten else None,
    "kept": kept,
  }


def forget_peak() -> bool:
  """Starts the peak of resident memory anew; False: that cannot be done."""
  try:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
  except OSError:
    return False
  return True


def peak() -> float | None:
  """The most resident memory of this process, in MiB."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM"):
      return int(line.split()[1]) / 1024
  return None
