"""XL3M: a long prompt reduced to the segments that make a model certain.

XL3M (Wang et al., 2024, arXiv 2405.17755) cuts a prompt into segments short
enough for the model, asks the question at its end behind each of them alone,
and answers from the segments behind which the prediction has the least entropy,
in the order of the text. What is public is the abstract and three summaries,
which speak of one distribution for each segment with the question: this is a
reconstruction, and no fidelity is claimed. Choices of this project: segments do
not overlap, and the distribution is that after the question's last token
(`over="question"`: the mean over all of its tokens).
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tokjax import selection

# From ids `[b, t]` and lengths `[b]`, padding last, to logits `[b, t, v]`.
Logits = Callable[[Array, Array], Array]


def key_context(
  logits: Logits,
  token: Int[Array, "b n"],
  length: Int[Array, "b"],
  *,
  question: int,
  segment: int,
  keep: int,
  over: Literal["question", "last"] = "last",
) -> tuple[Int[Array, "b m"], Int[Array, "b"]]:
  """The prompt that is answered instead of a longer one.

  Args:
    logits: the model, of ids `[b, segment + question]`.
    token: prompts, padding last.
    length: how many of their tokens are real, more than `question`.
    question: last tokens of a prompt, which ask.
    segment: tokens a segment; the last one may be shorter.
    keep: segments that remain, at most; shorter prompts stay as they are.
    over: the predictions whose entropy counts.

  Returns:
    Prompts of `min(keep, segments) * segment + question` places, zeros behind,
    and their lengths.

  Raises:
    ValueError: an option is out of range.
  """
  n = token.shape[1]
  for name, value in (("segment", segment), ("keep", keep)):
    if value < 1:
      raise ValueError(f"{name}={value}: must be 1 or more")
  if not 1 <= question < n:
    raise ValueError(
      f"question={question}: must lie in 1..{n - 1}, as prompts have {n} tokens"
    )
  if over not in ("question", "last"):
    raise ValueError(f"over={over!r}: must be 'question' or 'last'")
  count = -(-(n - question) // segment)
  spread = entropies(
    logits, token, length, question=question, segment=segment, over=over
  )

  def one(token, length, spread):
    before = length - question
    there = jnp.arange(count) * segment < before
    chosen = selection.in_order(
      selection.top_k(-spread, min(keep, count), mask=there)
    )
    at = chosen.index[:, None] * segment + jnp.arange(segment)[None]
    valid = chosen.valid[:, None] & (at < before)
    asked = before + jnp.arange(question)
    at = jnp.concatenate([at.reshape(-1), asked])
    valid = jnp.pad(valid.reshape(-1), (0, question), constant_values=True)
    # Real tokens first: the shorter segment may not be the last one there.
    order = selection.partition(valid).index
    ids = jnp.where(valid, token[jnp.minimum(at, n - 1)], 0)
    return ids[order], valid.sum(dtype=jnp.int32)

  return jax.vmap(one)(token, length, spread)


def entropies(
  logits: Logits,
  token: Int[Array, "b n"],
  length: Int[Array, "b"],
  *,
  question: int,
  segment: int,
  over: Literal["question", "last"] = "last",
) -> Float[Array, "b s"]:
  """Entropy, in nats, of what is predicted behind each segment alone.

  Arguments are those of `key_context`; segments that a prompt does not have may
  have any entropy.
  """
  n = token.shape[1]

  def of_segment(number):
    def row(token, length):
      before = length - question
      size = jnp.clip(before - number * segment, 0, segment)
      place = jnp.arange(segment + question)
      at = jnp.where(place < size, number * segment + place,
                     before + place - size)  # fmt: skip
      real = place < size + question
      ids = jnp.where(real, token[jnp.clip(at, 0, n - 1)], 0)
      return ids, size + question

    ids, lengths = jax.vmap(row)(token, length)
    p = jax.nn.log_softmax(logits(ids, lengths).astype(jnp.float32))
    spread = -(jnp.exp(p) * p).sum(axis=-1)
    back = lengths[:, None] - jnp.arange(segment + question)[None]
    counts = (back >= 1) & (back <= (question if over == "question" else 1))
    return jnp.where(counts, spread, 0.0).sum(axis=1) / counts.sum(axis=1)

  segments = -(-(n - question) // segment)
  return jax.lax.map(of_segment, jnp.arange(segments)).T
