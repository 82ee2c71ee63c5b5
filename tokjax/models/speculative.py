"""Speculative decoding: a draft guesses tokens, the model checks all at once.

    fast = Speculative(generator, draft=small)    # both read the same prompts
    fast = Speculative(generator)                 # the draft of recipe "flash"
    texts, said = fast.generate(prompts, images)

In a round the model takes the token it is sure of and k that were guessed, in
one step. Those that it would have said itself stay, the others are taken back
from its cache, and the token that it says instead is the next one. The text is
that of greedy decoding, whatever the draft says, up to rounding: a step of
several tokens adds up products in another order than steps of one. Examples of
a batch accept different numbers of tokens.

Leviathan et al., 2023 (arXiv 2211.17192), in its greedy form and with one
sequence of guesses.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from tokjax.attention import core
from tokjax.cache import several
from tokjax.models.decoder import Decoder
from tokjax.models.decoder_block import attend_of, cache_of
from tokjax.models.decoder_programs import programs_of
from tokjax.models.drafts import (
  AnyGenerator,
  ModelDraft,
  ModuleDraft,
  Settled,
  language_of,
)
from tokjax.models.generation import Generation, texts_of


class Draft(Protocol):
  """What guesses tokens."""

  def begin(
    self, going: Generation, inputs: tuple[Any, ...]
  ) -> tuple[Int[Array, "b k"], Any]:
    """Guesses what follows the first token after prompts, and a state.

    Args:
      going: the model's; its logits say the first token.
      inputs: the prompts, as the generator's `prefill` takes them.
    """
    ...

  def go_on(
    self, state: Any, settled: Settled
  ) -> tuple[Int[Array, "b k"], Any]:
    """Guesses what follows `settled.following`."""
    ...


@dataclasses.dataclass(frozen=True)
class Rounds:
  """How often the model was called, of each example.

  Attributes:
    rounds: steps of the model, `[b]`.
    tokens: that came out of them, `[b]`.
  """

  rounds: Int[np.ndarray, "b"]
  tokens: Int[np.ndarray, "b"]

  @property
  def per_round(self) -> float:
    """Tokens of a step of the model, a mean; 1 without speculation."""
    return float(self.tokens.sum() / max(self.rounds.sum(), 1))


@dataclasses.dataclass(frozen=True)
class Speculative:
  """A generator that is given several tokens at once; see the module.

  Attributes:
    generator: of the model; its slots say the cache, and may fill `draft`.
    draft: a generator of the same kind with the same vocabulary, which takes
      the same prompts: a smaller model, or the same with fewer visual tokens.
      None: the module in the model's slot `draft`.
    ahead: tokens that are guessed in a round, at most what the module guesses;
      None: all that it does, or 4.
  """

  generator: AnyGenerator
  draft: AnyGenerator | None = None
  ahead: int | None = None
  _target: AnyGenerator = dataclasses.field(init=False, repr=False)
  _draft: Draft = dataclasses.field(init=False, repr=False)

  def __post_init__(self):
    slots = _decoder(self.generator).slots
    module = slots.draft
    if (module is None) == (self.draft is None):
      raise ValueError(
        f"draft={self.draft and type(self.draft).__name__}: recipe"
        f" {slots.name!r} fills the slot 'draft' with {module!r}; give one of"
        " the two"
      )
    most = None if module is None else module.ahead
    ahead = self.ahead or most or 4
    if not 1 <= ahead <= (most or ahead):
      raise ValueError(
        f"ahead={self.ahead}: must be 1 or more"
        + (f", at most ahead={most} of the draft" if most else "")
      )
    if self.draft is not None:
      self._check_pair(self.draft)
    target = with_room(self.generator, ahead)
    if self.draft is None:
      draft: Draft = ModuleDraft(target, ahead)
    else:
      draft = ModelDraft(with_room(self.draft, ahead), ahead)
    object.__setattr__(self, "ahead", ahead)
    object.__setattr__(self, "_target", target)
    object.__setattr__(self, "_draft", draft)

  def _check_pair(self, draft: AnyGenerator) -> None:
    model = self.generator
    sizes = [_decoder(one).config.vocabulary for one in (model, draft)]
    if type(model) is not type(draft) or sizes[0] != sizes[1]:
      raise ValueError(
        f"draft: a {type(draft).__name__} with {sizes[1]} ids for a"
        f" {type(model).__name__} with {sizes[0]}; both must read the same"
        " prompts"
      )
    if draft.decode < model.decode or draft.capacity < model.capacity:
      raise ValueError(
        f"draft: has capacity={draft.capacity}, decode={draft.decode}; the"
        f" model has {model.capacity} and {model.decode}, and it needs as much"
      )
    if _decoder(draft).slots.draft is not None:
      raise ValueError("draft: has a draft of its own; leave that out")

  def stream(
    self, *inputs: Any, ends: tuple[int, ...] = (), most: int | None = None
  ) -> Iterator[np.ndarray]:
    """Tokens of each round `[b, ahead + 1]`, -1 behind the last of each.

    Args:
      *inputs: prompts, and images, as the generator's `prefill` takes them.
      ends: tokens that complete a text; they are given out.
      most: tokens of a text; None: the generator's `decode`.

    Raises:
      ValueError: `most` is negative or more than `decode`.
    """
    most = self.generator.decode if most is None else most
    if not 0 <= most <= self.generator.decode:
      raise ValueError(
        f"most={most}: must be 0 or more; the cache has room for"
        f" decode={self.generator.decode} tokens"
      )
    return self._stream(inputs, ends, most)

  def _stream(self, inputs, ends, most):
    if not most:
      return
    language = language_of(self._target)
    going = self._target.prefill(*inputs)
    alive = np.array(going.alive)
    sure = jnp.argmax(going.logits, axis=-1).astype(jnp.int32)
    guesses, state = self._draft.begin(going, inputs)
    going = dataclasses.replace(going, passage=None)
    said = np.zeros(alive.shape, np.int32)
    check = check_whole if language.one_program else check_guesses
    while True:
      tokens = jnp.concatenate([sure[:, None], guesses], axis=1)
      going, settled = check(
        language.model, language.params, going, tokens, jnp.array(alive)
      )
      given, over = _given(tokens, settled, alive, ends, most - said)
      yield given
      said += (given >= 0).sum(axis=1)
      alive &= ~over
      if not alive.any():
        return
      count = jnp.where(jnp.array(alive), settled.count, 0)
      guesses, state = self._draft.go_on(state, settled._replace(count=count))
      sure = settled.following

  def generate(
    self, *inputs: Any, **options: Any
  ) -> tuple[list[list[int]], Rounds]:
    """The tokens after each prompt, and how many steps they took.

    Args:
      *inputs, **options: see `stream`.
    """
    batch = len(inputs[0])
    rounds, tokens, columns = np.zeros(batch, int), np.zeros(batch, int), []
    for given in self.stream(*inputs, **options):
      rounds += (given >= 0).any(axis=1)
      tokens += (given >= 0).sum(axis=1)
      columns += list(given.T)
    return texts_of(iter(columns), batch), Rounds(rounds, tokens)


def check_guesses(
  model: Decoder,
  params: Any,
  going: Generation,
  tokens: Int[Array, "b t"],
  alive: Bool[Array, "b"],
) -> tuple[Generation, Settled]:
  """Takes a token that is sure and those guessed behind it; keeps the right.

  Args:
    model, params: of the language model.
    going: before the first of the tokens; it is used up.
    tokens: the sure one first.
    alive: False for texts that are complete: they stay as they are.
  """
  valid = jnp.broadcast_to(alive[:, None], tokens.shape)
  logits, features, states = programs_of(model).several(
    params, tokens, going.position, valid, going.states, going.shifts,
    going.ahead,
  )  # fmt: skip
  states, settled, logits = _settled(tokens, alive, logits, features, states)
  going = dataclasses.replace(
    going, states=states, logits=logits, position=going.position + settled.count
  )
  return going, settled


check_whole = jax.jit(
  check_guesses, static_argnums=0, donate_argnames="going"
)


@functools.partial(jax.jit, donate_argnums=4)
def _settled(tokens, alive, logits, features, states):
  """What of the tokens stays."""
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  right = jnp.cumprod(tokens[:, 1:] == best[:, :-1], axis=1).sum(axis=1)
  count = jnp.where(alive, 1 + right, 0)
  back = jnp.where(alive, tokens.shape[1] - count, 0)
  states = tuple(several.rewind(state, back) for state in states)
  settled = Settled(tokens, features, count, core.taken(best, right))
  return states, settled, core.taken(logits, right)


def _given(tokens, settled, alive, ends, left):
  """Tokens of a round, -1 behind each text's, and which texts are complete."""
  tokens, count = np.asarray(tokens), np.asarray(settled.count)
  place = np.arange(tokens.shape[1])[None]
  end = np.isin(tokens, ends)
  before = np.cumsum(end, axis=1) - end
  limit = np.minimum(count, np.where(alive, left, 0))[:, None]
  real = (place < limit) & (before == 0)
  over = (real & end).any(axis=1) | (real.sum(axis=1) >= left)
  return np.where(real, tokens, -1), over


def _decoder(generator: AnyGenerator) -> Decoder:
  return language_of(generator).model


def with_room(generator: AnyGenerator, ahead: int) -> AnyGenerator:
  """The same with room for guesses, in a cache that can be set back.

  Raises:
    ValueError: its cache cannot be.
  """
  model, own = generator.model, _decoder(generator)
  cache: Any = cache_of(own.slots)
  several.check(cache, attend_of(own.slots), own.slots.name)
  slots = dataclasses.replace(model.slots, cache=several.rewindable(cache))
  return dataclasses.replace(
    generator, model=model.clone(slots=slots, parent=None),
    decode=generator.decode + ahead,
  )  # fmt: skip
