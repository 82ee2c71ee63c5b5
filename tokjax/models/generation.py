"""Prompts to text: compiled prefill and decode steps over ragged batches.

Prompts are padded at their end to a bucket, so that there is one compilation
for each bucket and none for each length; positions are those of each example
alone. `prefill` and `decode_step` run the compiled programs of blocks,
`Generator` is the loop around them.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from tokjax.models import prefill as prompting
from tokjax.models.decoder import Decoder, States
from tokjax.models.decoder_block import cache_of
from tokjax.models.decoder_programs import programs_of
from tokjax.models.decoder_slots import Capacities, kind_capacities
from tokjax.models.passage import Passage
from tokjax.models.prefill import Given
from tokjax.models.sampling import Sampler
from tokjax.slots import Bytes
from tokjax.tokens import Kind

BUCKETS = tuple(2**i for i in range(4, 21))
GREEDY = Sampler()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
  """Texts that are being made.

  Attributes:
    states: of every block.
    logits: of the next token, `[b, v]` float32.
    position: of the next token in its text, `[b]`.
    alive: False once a text is complete, `[b]`.
    shifts: see `tokjax.models.prefill.Prefilled`.
    ahead: where positions have several axes, by how much those of the tokens to
      come are ahead of `position`, `[b]` (an image of many tokens takes few
      positions: then it is negative); None: not at all.
    passage: the prompts behind the last block, for a draft that reads them;
      None: the model has none.
  """

  states: States
  logits: Float[Array, "b v"]
  position: Int[Array, "b"]
  alive: Bool[Array, "b"]
  shifts: tuple[Int[Array, "b"], ...] | None = None
  ahead: Int[Array, "b"] | None = None
  passage: Passage | None = None


def prefill(
  model: Decoder,
  params: Any,
  tokens: Int[Given, "b n"],
  length: Int[Given, "b"],
  decode: int,
  chunk: int | None = None,
  kind: Int[Given, "b n"] | None = None,
  room: Capacities | None = None,
) -> Generation:
  """Takes prompts; one compilation for each padded length and kind of block.

  `prefill_whole` is the same as one program.

  Args:
    model: built with slots (static).
    params: its parameters.
    tokens: prompts, padded at their end.
    length: real tokens of each.
    decode: how many tokens can follow (static).
    chunk: tokens taken at a time (static); None: all. Shorter chunks need less
      memory for activations.
    kind: of each token, one of `Kind`; None: all are TEXT.
    room: the most tokens of each kind that a prompt has (static); None: as many
      as there are tokens. Reductions of one kind then save nothing.
  """
  done = prompting.prefill(
    model, params, tokens, length, decode, chunk, kind, room
  )
  return Generation(
    done.states, done.logits, done.position, _some(length), done.shifts,
    passage=done.passage,
  )  # fmt: skip


@jax.jit
def _some(length):
  return length > 0


def decode_step(
  model: Decoder, params: Any, going: Generation, token: Int[Given, "b"]
) -> Generation:
  """Takes one token of each text; those that are complete stay as they are.

  `going` is used up. `decode_whole` is the same as one program.
  """
  logits, position, states = programs_of(model).decode(
    params, token, going.position, going.alive, going.states, going.shifts,
    going.ahead,
  )  # fmt: skip
  return dataclasses.replace(
    going, states=states, logits=logits, position=position
  )


prefill_whole = jax.jit(prefill, static_argnums=(0, 4, 5, 7))
decode_whole = jax.jit(decode_step, static_argnums=0, donate_argnames="going")


@functools.partial(jax.jit, static_argnums=0)
def draw(
  sampler: Sampler, logits: Float[Array, "b v"], keys: Key[Array, "b"] | None
) -> Int[Array, "b"]:
  """The next token of each text."""
  if keys is None:
    return jax.vmap(sampler)(logits).astype(jnp.int32)
  return jax.vmap(sampler)(logits, keys).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Generator:
  """A model with parameters and room for prompts and answers.

  Attributes:
    model: built with slots.
    params: its parameters.
    capacity: the longest prompt, in tokens.
    decode: how many tokens can be generated.
    buckets: lengths that prompts are padded to, ascending; those beyond the
      capacity are cut to it.
    chunk: tokens of a prompt taken at a time; None: all.
    whole: compile the model as one program, which takes longer the deeper it
      is, and not as one program for each kind of block, which are called one
      after the other; None: where the default device is no CPU, so that
      nothing waits between blocks (not measured on a GPU or TPU).
  """

  model: Decoder
  params: Any
  capacity: int
  decode: int
  buckets: tuple[int, ...] = BUCKETS
  chunk: int | None = None
  whole: bool | None = None

  def __post_init__(self):
    for name in ("capacity", "decode"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: must be 1 or more")
    prompting.check(self.model, self.capacity, self.decode, self.chunk)

  def bucket(self, length: int) -> int:
    """The padded length of a prompt."""
    fits = [n for n in self.buckets if n >= length]
    return min([*fits, self.capacity])

  def pack(
    self, prompts: Sequence[Sequence[int]]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Prompts padded to one bucket `[b, n]`, and their lengths `[b]`.

    Raises:
      ValueError: no prompt, an empty one, one beyond the capacity, or an id
        that is not in the vocabulary.
    """
    if not len(prompts):
      raise ValueError("no prompts were given")
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
      raise ValueError(
        f"prompt {lengths.index(0)} is empty: give at least one token, such as"
        " the one that begins a text"
      )
    if max(lengths) > self.capacity:
      raise ValueError(
        f"prompt {lengths.index(max(lengths))} has {max(lengths)} tokens, the"
        f" capacity is {self.capacity}: make it shorter, or make the generator"
        f" with capacity={max(lengths)} or more"
      )
    for i, prompt in enumerate(prompts):
      _check_ids(i, prompt, self.model.config.vocabulary)
    tokens = np.zeros((len(prompts), self.bucket(max(lengths))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
      row[: len(prompt)] = prompt
    return tokens, np.asarray(lengths, np.int32)

  def prefill(
    self,
    prompts: Sequence[Sequence[int]],
    kinds: Sequence[Sequence[Kind]] | None = None,
  ) -> Generation:
    """Takes prompts; see `pack` for errors.

    Args:
      prompts: ids of each.
      kinds: the kind of each token; None: all are TEXT.
    """
    tokens, length = self.pack(prompts)
    kind = room = None
    if kinds is not None:
      kind = pack_kinds(prompts, kinds, tokens.shape[1])
      room = kind_capacities(kind, self.bucket)
      kind = np.where(kind < 0, int(Kind.TEXT), kind)
    run = prefill_whole if self.one_program else prefill
    return run(
      self.model, self.params, tokens, length, self.decode, self.chunk, kind,
      room,
    )  # fmt: skip

  @property
  def one_program(self) -> bool:
    """See `whole`."""
    if self.whole is None:
      return jax.default_backend() != "cpu"
    return self.whole

  def step(self, going: Generation, token: Int[Given, "b"]) -> Generation:
    """Takes one token of each text; `going` is used up."""
    run = decode_whole if self.one_program else decode_step
    return run(self.model, self.params, going, token)

  def stream(
    self,
    going: Generation,
    *,
    sampler: Sampler = GREEDY,
    key: PRNGKeyArray | None = None,
    ends: tuple[int, ...] = (),
    most: int | None = None,
  ) -> Iterator[np.ndarray]:
    """Tokens `[b]`, step by step; -1 for texts that are complete.

    Args:
      going: from `prefill`; it is used up.
      sampler: how tokens are drawn.
      key: for a temperature above 0. An example's draws do not depend on the
        others in its batch.
      ends: tokens that complete a text; they are given out.
      most: stop after this many, 0 for none; None: `decode`.

    Raises:
      ValueError: `most` is negative or more than `decode`, `going` is used up,
        or the model has a draft.
    """
    if self.model.slots.draft is not None:
      raise ValueError(
        f"recipe {self.model.slots.name!r} fills 'draft', which text that is"
        " made token by token does not use; use"
        " tokjax.models.Speculative(generator)"
      )
    most = self.decode if most is None else most
    if not 0 <= most <= self.decode:
      raise ValueError(
        f"most={most}: must be 0 or more; the cache has room for"
        f" decode={self.decode} tokens"
      )
    if any(x.is_deleted() for x in jax.tree.leaves(going)):
      raise ValueError(
        "going is used up: an earlier stream took it over; prefill again"
      )
    return self._stream(going, sampler, key, ends, most)

  def _stream(self, going: Generation, sampler, key, ends, most):
    for i in range(most):
      keys = None
      if key is not None:
        keys = _keys(jax.random.fold_in(key, i), going.alive.shape[0])
      token = draw(sampler, going.logits, keys)
      # A copy: the next step takes the buffer over.
      alive = np.array(going.alive)
      given = np.where(alive, np.asarray(token), -1)
      yield given
      alive &= ~np.isin(given, ends)
      if i + 1 == most or not alive.any():
        return
      going = dataclasses.replace(going, alive=jnp.array(alive))
      going = self.step(going, token)

  def generate(
    self, prompts: Sequence[Sequence[int]], **options: Any
  ) -> list[list[int]]:
    """The tokens after each prompt; options of `stream`."""
    stream = self.stream(self.prefill(prompts), **options)
    return texts_of(stream, len(prompts))

  def bytes(self, going: Generation) -> Bytes:
    """Sizes of the cache of all blocks."""
    cache = cache_of(self.model.slots)
    sizes = [
      cache.bytes(layer, state)
      for layer, state in zip(self.model.layers, going.states, strict=True)
    ]
    return Bytes(sum(s.logical for s in sizes), sum(s.physical for s in sizes))


def texts_of(stream: Iterator[np.ndarray], count: int) -> list[list[int]]:
  """The ids of each of `count` texts, from what `Generator.stream` yields."""
  texts: list[list[int]] = [[] for _ in range(count)]
  for tokens in stream:
    for text, token in zip(texts, tokens, strict=True):
      if token >= 0:
        text.append(int(token))
  return texts


def pack_kinds(
  prompts: Sequence[Sequence[int]],
  kinds: Sequence[Sequence[Kind]],
  length: int,
) -> np.ndarray:
  """Kinds of all prompts, -1 for padding, `[b, length]`.

  Raises:
    ValueError: not one kind for each token.
  """
  sizes = [len(prompt) for prompt in prompts]
  if [len(row) for row in kinds] != sizes:
    raise ValueError(
      f"kinds: has {[len(row) for row in kinds]} entries for prompts of"
      f" {sizes} tokens; give one kind for each token"
    )
  packed = np.full((len(prompts), length), -1, np.int32)
  for row, given in zip(packed, kinds, strict=True):
    row[: len(given)] = [int(kind) for kind in given]
  return packed
def _check_ids(i: int, prompt: Sequence[int], vocabulary: int) -> None:
  """Raises ValueError for what is no token id: lookups would give NaN."""
  ids = np.asarray(prompt)
  if ids.ndim != 1 or ids.dtype.kind not in "iu":
    raise ValueError(f"prompt {i}: must be a list of token ids, not {prompt!r}")
  wrong = ids[(ids < 0) | (ids >= vocabulary)]
  if wrong.size:
    raise ValueError(
      f"prompt {i} has the token id {wrong[0]}; the model's vocabulary has"
      f" {vocabulary}, ids 0 to {vocabulary - 1}: use the tokenizer that"
      " belongs to the model"
    )


@functools.partial(jax.jit, static_argnums=1)
def _keys(key, batch: int):
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch))
