"""What guesses tokens for `Speculative`: another model, or a module."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokjax.attention import core
from tokjax.cache import several
from tokjax.learned.latent_draft import Seen, following_each
from tokjax.models.decoder import Decoder
from tokjax.models.decoder_programs import outside_blocks, programs_of
from tokjax.models.generation import Generation, Generator
from tokjax.models.passage import Passage
from tokjax.models.vlm_generation import VisionLanguageGenerator
from tokjax.tokens import Kind

AnyGenerator = Generator | VisionLanguageGenerator


def language_of(generator: AnyGenerator) -> Generator:
  """The generator of the language model."""
  if isinstance(generator, VisionLanguageGenerator):
    return generator.language
  return generator


class Settled(NamedTuple):
  """What a round settled, for drafts.

  Attributes:
    tokens: that the model took in; real ones first, `[b, t]`.
    features: of them, normed, `[b, t, d]`.
    count: real ones, 0 for texts that are complete, `[b]`.
    following: the token after them, which it has not taken in, `[b]`.
  """

  tokens: Int[Array, "b t"]
  features: Float[Array, "b t d"]
  count: Int[Array, "b"]
  following: Int[Array, "b"]


@dataclasses.dataclass(frozen=True)
class ModelDraft:
  """Another model guesses token by token, greedily.

  Attributes:
    generator: of it, with room for the tokens that are guessed.
    ahead: tokens a round.
  """

  generator: AnyGenerator
  ahead: int

  def begin(self, going, inputs):
    own = self.generator.prefill(*inputs)
    first = jnp.argmax(going.logits, axis=-1).astype(jnp.int32)
    one = jnp.ones(first.shape, jnp.int32)
    return self._guess(own, first[:, None], jnp.where(own.alive, one, 0))

  def go_on(self, state: Generation, settled: Settled):
    # The last guess has not been taken in: there was nothing to guess behind.
    count = settled.count
    whole = count > self.ahead
    back = jnp.where(count > 0, self.ahead - jnp.minimum(count, self.ahead), 0)
    last = settled.tokens[:, -1]
    tokens = jnp.stack(
      [jnp.where(whole, last, settled.following), settled.following], axis=1
    )
    own = _rewound(state, back)
    return self._guess(own, tokens, jnp.where(count > 0, 1 + whole, 0))

  def _guess(self, own: Generation, tokens, count):
    language = language_of(self.generator)
    run = _guess_whole if language.one_program else _guess
    return run(language.model, language.params, own, tokens, count, self.ahead)


@functools.partial(jax.jit, donate_argnums=0)
def _rewound(going: Generation, back: Int[Array, "b"]) -> Generation:
  states = tuple(several.rewind(state, back) for state in going.states)
  return dataclasses.replace(
    going, states=states, position=going.position - back
  )


def _guess(
  model: Decoder, params: Any, own: Generation, tokens, count, ahead: int
) -> tuple[Int[Array, "b k"], Generation]:
  """Takes `count` tokens, then guesses the next ones."""
  found, alive = [], count > 0
  for _ in range(ahead):
    valid = jnp.arange(tokens.shape[1])[None] < count[:, None]
    logits, _, states = programs_of(model).several(
      params, tokens, own.position, valid, own.states, own.shifts, own.ahead
    )
    own = dataclasses.replace(
      own, states=states, position=own.position + count
    )
    found.append(_last(logits, count))
    tokens, count = found[-1][:, None], alive.astype(jnp.int32)
  return jnp.stack(found, axis=1), own


_guess_whole = jax.jit(_guess, static_argnums=(0, 5), donate_argnums=2)


@jax.jit
def _last(logits, count):
  at = jnp.maximum(count - 1, 0)
  return jnp.argmax(core.taken(logits, at), axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class ModuleDraft:
  """The module in a model's slot `draft` guesses all tokens at once.

  Attributes:
    generator: of the model.
    ahead: how many of its guesses are used.
  """

  generator: AnyGenerator
  ahead: int

  def begin(self, going, inputs):
    del inputs
    language, passage = language_of(self.generator), going.passage
    tokens: Any = passage.tokens
    text = np.asarray(tokens.mask & (tokens.kind == Kind.TEXT)).sum(axis=1)
    room = min(language.bucket(int(text.max())), tokens.x.shape[1])
    rest = outside_blocks(language.params)
    sure = jnp.argmax(going.logits, axis=-1)
    guesses, seen = _begun(
      language.model, rest, passage, sure, (room, language.decode)
    )
    return guesses[:, : self.ahead], seen

  def go_on(self, state: Seen, settled: Settled):
    language = language_of(self.generator)
    guesses, seen = _more(
      language.model, outside_blocks(language.params), state, settled,
      language.decode,
    )  # fmt: skip
    return guesses[:, : self.ahead], seen


@functools.partial(jax.jit, static_argnums=(0, 4))
def _begun(model: Decoder, rest, passage: Passage, sure, room):
  tokens: Any = passage.tokens

  def begin(own):
    guessed, seen = own.draft.begin(
      own.norm(tokens.x), _embedded(own, passage.ids),
      _embedded(own, sure[:, None])[:, 0], tokens.kind, tokens.mask, room,
    )  # fmt: skip
    return _said(own, guessed), seen

  return model.apply({"params": rest}, method=begin)


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _more(model: Decoder, rest, seen: Seen, settled: Settled, room: int):
  next_ = following_each(settled.tokens, settled.count, settled.following)

  def more(own):
    guessed, after = own.draft.more(
      seen, settled.features, _embedded(own, next_), settled.count, room
    )
    return _said(own, guessed), after

  return model.apply({"params": rest}, method=more)


def _embedded(own: Decoder, ids: Int[Array, "b t"]) -> Float[Array, "b t d"]:
  """Text as it enters the first block."""
  return own.enter(ids, jnp.zeros_like(ids), jnp.ones(ids.shape, bool)).x


def _said(own: Decoder, features: Float[Array, "b k d"]) -> Int[Array, "b k"]:
  """What the head makes of features."""
  return jnp.argmax(own.logits(features), axis=-1).astype(jnp.int32)
