"""`Prompted`: base of caches that see a prompt whole and then compress it."""

import dataclasses
from typing import Any

from jaxtyping import Array

from tokjax.attention.causal import Causal
from tokjax.cache import workspace
from tokjax.cache.workspace import Workspace
from tokjax.layer import LSE, NOTES, Arrivals, Carry, Layer
from tokjax.slots import Bytes


def refuse_notes(cache: Any, attend: Any) -> None:
  """Raises where attention leaves notes that a cache cannot keep."""
  if attend.leaves_notes:
    fixes = {
      "memo": "Retriever()", "cores": "Cores()", "states": "MultiTokenCache()",
    }  # fmt: skip
    fix = fixes.get(
      attend.leaves_notes, "KV() with Exact() entries that are read whole"
    )
    raise ValueError(
      f"{type(attend).__name__} leaves notes for the cache, which"
      f" {type(cache).__name__} does not keep; use {fix}"
    )


class Prompted:
  """Base of caches that see a prompt whole before they compress it.

  A subclass says how many last queries it needs (`queries`; None: all), and
  has `compress`, which makes the decoding state, and `step`, which takes in a
  token and attends.
  """

  needs: tuple[str, ...] = ()
  queries: int | None = 0

  def check(self, layer, attend, prompt: int, decode: int) -> None:
    """Raises ValueError for parts that do not go together."""
    refuse_notes(self, attend)

  def parameters(self, layer: Layer, width: int, key) -> Any:
    """Nothing is learned."""
    return None

  def init(
    self, layer: Layer, batch: int, prompt: int, decode: int
  ) -> Workspace:
    return workspace.start(layer, batch, prompt, decode, window=self.queries)

  def prefill(
    self, layer, state, arrivals, *, attend, params, carry, last: bool
  ) -> tuple[Array, Any, Carry]:
    """Attention to the exact prompt; after the last chunk it is compressed."""
    space = workspace.add(state, arrivals)
    carry = {name: x for name, x in carry.items() if name != LSE}
    memory = space.memory
    if type(attend) is Causal:  # Others may look at more than is in sight.
      memory = workspace.in_sight(space, layer, arrivals.q.shape[1])
    out, carry = attend(layer, arrivals, memory, params=params, carry=carry)
    carry = dict(carry)
    notes, lse = carry.pop(NOTES, {}), carry.pop(LSE, None)
    if not last:
      return out, space, carry
    space = dataclasses.replace(space, lse=lse)
    state = self.compress(layer, space, notes, params)
    return out, self.start(layer, state, arrivals, attend), carry

  def decode(self, layer, state, arrivals, *, attend, params, carry):
    """One token: `step`, and what attention does with heads' outputs."""
    a = arrivals.clean()
    out, state, carry = self.step(layer, state, a, attend, params, carry)
    return attend.finish(layer, out, a, params), state, carry

  def compress(
    self, layer: Layer, space: Workspace, notes: dict[str, Array], params
  ) -> Any:
    """The decoding state; `notes` `[b, G, n, ...]` come from attention."""
    raise NotImplementedError

  def start(self, layer: Layer, state, arrivals: Arrivals, attend) -> Any:
    """The decoding state where `attend` decides, too; from `compress`."""
    del layer, arrivals, attend
    return state

  def step(self, layer, state, arrivals, attend, params, carry):
    """Outputs `[b, 1, H, D]` before `attend.finish`, state and carry."""
    raise NotImplementedError

  def bytes(self, layer: Layer, state: Any) -> Bytes:
    """Sizes of a decoding state."""
    raise NotImplementedError
