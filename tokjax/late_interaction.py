"""Retrieval by tokens: exact late interaction, and XTR (Lee et al., 2023).

A query and a document are as similar as, in the mean over the query's tokens,
the most similar token of the document. XTR scores documents by the tokens that
it retrieved alone, and gathers no document: what was not retrieved is taken to
be as similar as the last token that was. Checked against
google-deepmind/xtr:xtr_evaluation_on_beir_miracl.ipynb (52d5b5e); what training
scores is the paper's text (appendix C). Functions of one query are lifted with
`jax.vmap`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokjax import selection


class Found(NamedTuple):
  """Documents, the best first.

  Attributes:
    document: number, `[c]`.
    score: `[c]`.
    valid: False where fewer were found, `[c]`.
  """

  document: Int[Array, "c"]
  score: Float[Array, "c"]
  valid: Bool[Array, "c"]


def exact_scores(
  query: Float[Array, "i d"],
  mask: Bool[Array, "i"],
  tokens: Float[Array, "n d"],
  document: Int[Array, "n"],
  documents: int,
) -> Float[Array, "m"]:
  """Late interaction with every document; minus infinity for empty ones.

  Args:
    query: token vectors of the query.
    mask: its real tokens.
    tokens: token vectors of the whole corpus.
    document: whose they are, in ascending order.
    documents: how many there are (static).
  """
  best = jax.ops.segment_max(
    tokens @ query.T, document, documents, indices_are_sorted=True
  )
  best = jnp.where(mask[None], best, 0.0)
  return best.sum(axis=1) / jnp.maximum(mask.sum(), 1)


def search(
  query: Float[Array, "i d"],
  mask: Bool[Array, "i"],
  tokens: Float[Array, "n d"],
  document: Int[Array, "n"],
  k: int = 100,
) -> Found:
  """The documents of the k tokens most similar to each token of the query.

  Args:
    query, mask, tokens, document: as for `exact_scores`.
    k: tokens that are retrieved for each of the query (static), at most n.

  Returns:
    At most i * k documents.

  Raises:
    ValueError: k is not in 1..n.
  """
  if not 1 <= k <= tokens.shape[0]:
    raise ValueError(f"k={k}: must lie in 1..{tokens.shape[0]}, the tokens")
  similarity = query @ tokens.T
  index = selection.top_indices(similarity, k)
  best = jnp.take_along_axis(similarity, index, axis=1)
  return scored(best, document[index], mask)


def scored(
  similarity: Float[Array, "i k"],
  document: Int[Array, "i k"],
  mask: Bool[Array, "i"],
) -> Found:
  """Documents by what was retrieved of them, for any index of tokens.

  Args:
    similarity: of the tokens that each of the query retrieved, descending.
    document: whose they are.
    mask: real tokens of the query.
  """
  i, k = similarity.shape
  none = jnp.iinfo(jnp.int32).max
  document = jnp.where(mask[:, None], document, none).reshape(-1)
  # Each document once, in ascending order.
  each = jnp.unique(document, size=i * k, fill_value=none)
  place = jnp.searchsorted(each, document)
  row = jnp.repeat(jnp.arange(i), k)
  best = jnp.full((i, i * k), -jnp.inf).at[row, place].max(
    similarity.reshape(-1)
  )
  best = jnp.where(best > -jnp.inf, best, similarity[:, -1:])
  score = jnp.where(mask[:, None], best, 0.0).sum(axis=0)
  score = score / jnp.maximum(mask.sum(), 1)
  order = selection.top_k(score, i * k, mask=each < none)
  return Found(each[order.index], score[order.index], order.valid)


def trained_scores(
  query: Float[Array, "b i d"],
  query_mask: Bool[Array, "b i"],
  document: Float[Array, "m j d"],
  document_mask: Bool[Array, "m j"],
  k: int,
) -> Float[Array, "b m"]:
  """Scores of a batch as XTR trains them: by retrieved tokens alone.

  Each token of a query retrieves the k most similar ones of all documents. A
  document's score is the mean, over the query's tokens that retrieved some of
  it, of the most similar one; 0 if none did.

  Args:
    query, query_mask: token vectors and which are real.
    document, document_mask: of the documents, negatives among them.
    k: tokens that are retrieved (static), at most m * j.

  Raises:
    ValueError: k is not in 1..m * j.
  """
  (b, i, _), (m, j, _) = query.shape, document.shape
  if not 1 <= k <= m * j:
    raise ValueError(f"k={k}: must lie in 1..{m * j}, the tokens of the batch")
  x = jnp.einsum("bid,mjd->bimj", query, document)
  there = document_mask.reshape(1, 1, -1)
  flat = jnp.where(there, x.reshape(b, i, -1), -jnp.inf)
  index = selection.top_indices(jax.lax.stop_gradient(flat), k)
  rows = jnp.arange(b)[:, None, None], jnp.arange(i)[None, :, None]
  kept = jnp.zeros(flat.shape, bool).at[*rows, index].set(True)
  kept = (kept & there & query_mask[:, :, None]).reshape(x.shape)
  some = kept.any(axis=-1)
  best = jnp.where(kept, x, -jnp.inf).max(axis=-1)
  total = jnp.where(some, best, 0.0).sum(axis=1)
  return total / jnp.maximum(some.sum(axis=1), 1)


def retrieval_loss(
  scores: Float[Array, "b m"], scale: float = 1.0
) -> Float[Array, ""]:
  """Cross-entropy; document number r is the one that query r looks for.

  Args:
    scores: see `trained_scores`; documents from number b on are negatives.
    scale: factor on the scores, an inverse temperature.
  """
  right = jnp.diagonal(jax.nn.log_softmax(scale * scores, axis=-1))
  return -right.mean()
