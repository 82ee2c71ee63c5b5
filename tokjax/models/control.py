"""Actions step by step, where a step is told what earlier ones attended to.

VLA-Pruner (2025): the visual tokens that a robot needs now are much like those
that its last actions attended to. A `Controller` holds no state: what is
remembered is a `History`, which goes in and comes out.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.cache.kv import KV
from tokjax.cache.tally import Tally, attended
from tokjax.models.generation import GREEDY, Generation, draw
from tokjax.models.vlm import Prompts
from tokjax.models.vlm_generation import VisionLanguageGenerator
from tokjax.models.vlm_prompts import Ids, Images
from tokjax.tokens import Kind


@dataclasses.dataclass(frozen=True)
class History:
  """What the latest steps attended to.

  Attributes:
    steps: attention of an action to the visual tokens of each prompt, in order,
      mean over heads, blocks and tokens of the action, `[b, v]` each; zeros for
      tokens that were pruned. The latest step is the first.
  """

  steps: tuple[Float[np.ndarray, "b v"], ...] = ()

  def recalled(self, decay: float) -> Float[np.ndarray, "b v"]:
    """The sum over steps, the latest times `decay`, the one before times its
    square and so on."""
    weighted = [decay ** (i + 1) * x for i, x in enumerate(self.steps)]
    return np.sum(weighted, axis=0)


@dataclasses.dataclass(frozen=True)
class Controller:
  """A model of actions with a recipe that asks `signals.Recalled`.

  Attributes:
    generator: of the model; its cache has a `Tally`.
    length: tokens of an action.
    window: how many steps are recalled; as many are taken without a reduction
      first.
    decay: see `History.recalled`.
    blocks: first and last block (exclusive) whose attention is recalled, as
      fractions of the depth: the upper half, as in the paper; the official code
      takes the 16th of 32, (15 / 32, 0.5).
  """

  generator: VisionLanguageGenerator
  length: int
  window: int = 3
  decay: float = 0.8
  blocks: tuple[float, float] = (0.5, 1.0)

  def __post_init__(self):
    cache = self.generator.model.slots.cache
    if not isinstance(cache, KV) or not isinstance(cache.trim, Tally):
      raise ValueError(
        f"generator: recipe {self.generator.model.slots.name!r} has a cache"
        " that does not add up attention; use KV(trim=Tally()), as the recipe"
        " vla_pruner does"
      )
    if not 1 <= self.length <= self.generator.decode:
      raise ValueError(
        f"length={self.length}: must be in 1..{self.generator.decode}, the"
        " tokens that the generator has room for"
      )
    if self.window < 1 or not 0 < self.decay <= 1:
      raise ValueError(
        f"window={self.window}, decay={self.decay}: must be 1 or more, and in"
        " (0, 1]"
      )
    if self.blocks[0] < cache.trim.since:
      raise ValueError(
        f"blocks={self.blocks}: attention is added up from {cache.trim.since}"
        " of the depth on; begin there, or give the recipe an earlier since="
      )
    if not self._recalled_blocks:
      raise ValueError(
        f"blocks={self.blocks}: name no block; must be fractions of the depth,"
        " the first below the last"
      )

  @property
  def _recalled_blocks(self) -> range:
    depth = self.generator.model.decoder.config.depth
    first, last = (min(max(int(x * depth), 0), depth) for x in self.blocks)
    return range(first, last)

  @property
  def whole(self) -> VisionLanguageGenerator:
    """The generator of a model that reduces nothing, with the same cache."""
    model = self.generator.model
    slots = dataclasses.replace(model.slots, reduce=())
    return dataclasses.replace(
      self.generator, model=model.clone(slots=slots, parent=None)
    )

  def act(
    self,
    prompts: Sequence[Ids],
    images: Sequence[Images],
    history: History = History(),
  ) -> tuple[Int[np.ndarray, "b a"], History]:
    """The tokens of an action for each prompt, and what the next step is told.

    Args:
      prompts, images: see `VisionLanguageGenerator.prefill`; as many visual
        tokens as in the steps before.
      history: what the last call returned; nothing at the first step.

    Raises:
      ValueError: other visual tokens than the history is about.
    """
    full = len(history.steps) < self.window
    generator = self.whole if full else self.generator
    packed, room = generator.pack(prompts, images)
    if not full:
      told = spread(packed, history.recalled(self.decay))
      packed = dataclasses.replace(packed, recalled=told)
    going = generator.prefill_packed(packed, room)
    tokens = []
    for i in range(self.length):
      tokens.append(np.asarray(draw(GREEDY, going.logits, None)))
      # Attention is that of the rows that the tokens are read from.
      if i + 1 < self.length:
        going = generator.step(going, tokens[-1])
    latest = self._attended(packed, going)
    kept = (latest, *history.steps)[: self.window]
    return np.stack(tokens, axis=1), History(kept)

  def _attended(
    self, packed: Prompts, going: Generation
  ) -> Float[np.ndarray, "b v"]:
    """Of the action whose tokens were just generated."""
    model = self.generator.model.decoder
    own = [(model.layers[i], going.states[i]) for i in self._recalled_blocks]
    n = packed.tokens.shape[1]
    total = _mean([state.store for _, state in own], n, own[0][0].heads)
    return gather(packed, np.asarray(total) / self.length)


@jax.jit(static_argnums=(1, 2))
def _mean(stores, tokens: int, heads: int) -> Float[Array, "b n"]:
  found = [attended(store, tokens, heads) for store in stores]
  return jnp.stack(found).mean(axis=0)


def places(packed: Prompts) -> list[np.ndarray]:
  """Where the visual tokens of each prompt are."""
  visual = np.asarray((packed.kind == Kind.VISUAL) & packed.valid)
  return [np.flatnonzero(row) for row in visual]


def gather(
  packed: Prompts, values: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, "b v"]:
  """Values of the visual tokens of each prompt, in order, then zeros."""
  at = places(packed)
  found = np.zeros((len(at), max(map(len, at))), np.float32)
  for row, value, own in zip(found, values, at, strict=True):
    row[: len(own)] = value[own]
  return found


def spread(
  packed: Prompts, values: Float[np.ndarray, "b v"]
) -> Float[Array, "b n"]:
  """The reverse of `gather`.

  Raises:
    ValueError: there are other visual tokens.
  """
  at = places(packed)
  shape = (len(at), max(map(len, at)))
  if values.shape != shape:
    raise ValueError(
      f"history: is about {values.shape[1]} visual tokens of {len(values)}"
      f" prompts, and these have {shape[1]} in {shape[0]}; begin with an empty"
      " History"
    )
  found = np.zeros(packed.tokens.shape, np.float32)
  for row, value, own in zip(found, values, at, strict=True):
    row[own] = value[: len(own)]
  return jnp.asarray(found)
