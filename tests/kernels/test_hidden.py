"""What is hidden has no influence, whatever is stored there.

Every operation is given NaN and infinities where a mask hides them, and must
return what it returns for ordinary numbers, forward and backward; and a
query that does see a NaN must not return a number.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
  attention_mass,
  block_sparse_attention,
  decode_attention,
  linear_attention,
)
from pallas_kernels import layout as layouts
from pallas_kernels.attention_mass.api import attention_rows

IMPLEMENTATIONS = ("reference", "xla", "tpu_interpret")
# Tokens 40 to 43 are stored badly, in the middle of one block of the kernels.
N, BAD = 100, slice(40, 44)
every_implementation = pytest.mark.parametrize(
  "implementation", IMPLEMENTATIONS
)


def arrays():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    "q": draw(1, N, 2, 8),
    "k": draw(1, N, 1, 8),
    "v": draw(1, N, 1, 8),
    "bias": draw(1, 2, N),
  }


def spoiled(given, names):
  """NaN and infinities in the bad tokens of some arrays."""
  given = {name: x.copy() for name, x in given.items()}
  for name in names:
    along = (0, slice(None), BAD) if name == "bias" else (0, BAD)
    shape = given[name][along].shape
    bad = np.resize(np.array([np.nan, np.inf, -np.inf], np.float32), shape)
    given[name][along] = np.abs(bad) if name == "bias" else bad
  return given


def ids():
  """A segment of their own for the bad tokens."""
  own = np.zeros((1, N), np.int32)
  own[:, BAD] = 1
  return own


@functools.partial(jax.jit, static_argnames=("implementation", "how"))
def attention(given, weight, *, implementation, how):
  """Output, log-sum-exp and gradients; bad tokens are hidden from the others.

  `how`: "mask" (causal: only later queries see them), "segments", or "bias"
  (minus infinity, for the first head only).
  """
  layout = layouts.from_pattern(
    layouts.Causal() if how == "mask" else layouts.Full(), q_len=N
  )

  def run(given):
    more = {}
    if how == "segments":
      more = {"q_segment_ids": ids(), "k_segment_ids": ids()}
    bias = given["bias"]
    if how == "bias":
      bias = bias.at[:, 0, BAD].set(-jnp.inf)
    out, lse = block_sparse_attention(
      given["q"], given["k"], given["v"], layout,
      bias=None if how == "segments" else bias,
      implementation=implementation, return_lse=True, precision="highest",
      **more,
    )  # fmt: skip
    rows = jnp.swapaxes(out, 1, 2)
    loss = jnp.where(weight, rows.sum(-1), 0) ** 2 + jnp.where(weight, lse, 0)
    return loss.sum(), (rows, lse)

  return jax.grad(run, has_aux=True)(given)


def watched(how):
  """Queries `[1, 2, N]` that do not see the bad tokens."""
  rows = np.ones((1, 2, N), bool)
  if how == "mask":
    rows[:, :, BAD.start :] = False
  elif how == "segments":
    rows[:, :, BAD] = False
  else:
    rows[:, 1] = False
  return rows


@pytest.mark.parametrize("how", ("mask", "segments", "bias"))
@every_implementation
def test_block_sparse_attention(implementation, how):
  rows = watched(how)
  run = functools.partial(
    attention, weight=rows, implementation=implementation, how=how
  )
  names = "kv" if how == "bias" else ("q", "k", "v", "bias")
  clean, bad = arrays(), spoiled(arrays(), names)
  expected, results = run(clean)
  gradients, found = run(bad)
  for x, y in zip(found, results, strict=True):
    np.testing.assert_array_equal(np.asarray(x)[rows], np.asarray(y)[rows])
    assert np.isnan(np.asarray(x)[~rows]).all()
  for name, gradient in gradients.items():
    np.testing.assert_array_equal(gradient, expected[name], err_msg=name)


@pytest.mark.parametrize("implementation", ("reference", "xla"))
def test_queries_that_see_nan_have_no_number_as_gradient(implementation):
  rows = np.ones((1, 2, N), bool)
  gradients, _ = attention(
    spoiled(arrays(), "v"), rows, implementation=implementation, how="mask"
  )
  sees = ~watched("mask")[0].swapaxes(0, 1)
  d_q = np.asarray(gradients["q"][0])
  assert np.isnan(d_q[sees]).all() and np.isfinite(d_q[~sees]).all()


@functools.partial(jax.jit, static_argnames=("implementation", "segments"))
def mass(given, weights, *, implementation, segments):
  """Attention that keys receive, and gradients; "rows": of some queries."""
  layout = layouts.from_pattern(
    layouts.Full() if segments else layouts.Causal(), q_len=N
  )
  more = {"q_segment_ids": ids(), "k_segment_ids": ids()} if segments else {}
  shown = ~ids()[0].astype(bool) if segments else np.arange(N) < BAD.start

  def run(given):
    more["bias"] = None if segments else given["bias"]
    if implementation == "rows":
      rows = np.flatnonzero(shown)[::7]
      found = attention_rows(
        given["q"], given["k"], rows, layout=layout, **more
      ).sum(axis=2)
    else:
      found = attention_mass(
        given["q"], given["k"], layout=layout, weights=weights,
        implementation=implementation, precision="highest", **more,
      )  # fmt: skip
    return jnp.sum(jnp.where(shown, found, 0) ** 2), found[..., shown]

  gradients, found = jax.grad(run, has_aux=True)(given)
  return {name: gradients[name] for name in ("q", "k")}, found


# The simulator is slow; "mask" and "segments" are one selection in its kernels.
@pytest.mark.parametrize(
  "implementation, segments",
  [("tpu_interpret", False)]
  + [(x, y) for x in ("reference", "xla", "rows") for y in (False, True)],
)
def test_attention_mass(implementation, segments):
  # Causal: queries that see the bad keys are left out by their weight.
  weights = np.ones(N, np.float32)
  if not segments:
    weights[BAD.start :] = 0
  run = functools.partial(
    mass, weights=weights, implementation=implementation, segments=segments
  )
  names = ("q", "k") if segments else ("q", "k", "bias")
  expected, results = run(arrays())
  gradients, found = run(spoiled(arrays(), names))
  np.testing.assert_array_equal(found, results)
  for name, gradient in gradients.items():
    np.testing.assert_array_equal(gradient, expected[name], err_msg=name)


@pytest.mark.parametrize("implementation", ("reference", "xla", "rows"))
def test_keys_that_a_nan_query_sees_receive_no_number(implementation):
  given = spoiled(arrays(), "q")
  if implementation == "rows":
    found = attention_rows(given["q"], given["k"], np.array([41]))
  else:
    found = attention_mass(
      given["q"], given["k"], implementation=implementation
    )
  assert np.isnan(found).all()


@pytest.mark.parametrize("how", ("length", "list", "bias", "causal"))
@every_implementation
def test_decode_attention(implementation, how):
  """An unfilled part, blocks that are not read, and keys that a bias hides."""
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  t = 2 if how == "causal" else 1
  q, k, v = draw(1, t, 2, 128), draw(1, 256, 1, 128), draw(1, 256, 1, 128)
  bias = np.zeros((1, 2, 256), np.float32)
  first, options = 128, {}
  if how == "length":
    first, options = 100, {"lengths": jnp.array([100])}
  elif how == "list":
    options = {"blocks": jnp.array([[[0, 1]]]), "counts": jnp.array([[1]])}
  elif how == "bias":
    bias[:, 0, 200:] = -np.inf
    first, options = 200, {"bias": bias}
  else:
    first, options = 255, {"causal": True}
  run = functools.partial(
    decode_attention, implementation=implementation, return_lse=True, **options
  )
  expected = run(q, k, v)
  k[:, first:], v[:, first:] = np.nan, np.inf
  out, lse = (np.asarray(x) for x in run(q, k, v))
  if how in ("length", "list"):
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])
    return
  # The second head, or the second query, sees what is not finite.
  rows = out[0].swapaxes(0, 1) if how == "bias" else out[0]
  clean = np.asarray(expected[0][0])
  clean = clean.swapaxes(0, 1) if how == "bias" else clean
  np.testing.assert_array_equal(rows[0], clean[0])
  assert np.isnan(rows[1]).all() and np.isnan(lse).any()


@functools.partial(jax.jit, static_argnames=("implementation",))
def linear(given, *, implementation):
  """Outputs before the bad tokens, all outputs, and gradients of the former."""

  def run(given):
    out, last = linear_attention(
      given["q"], given["k"], given["v"], log_decay=jnp.float32(-0.1),
      implementation=implementation, precision="highest", return_state=True,
      block=32,
    )  # fmt: skip
    early = out[:, : BAD.start]
    return jnp.sum(early**2), (early, out[:, BAD.start :], last)

  gradients, found = jax.grad(run, has_aux=True)(given)
  return {name: gradients[name] for name in "qkv"}, found


@pytest.mark.parametrize("names", ("kv", "q"))
@every_implementation
def test_linear_attention(implementation, names):
  run = functools.partial(linear, implementation=implementation)
  expected, (early, late, state) = run(arrays())
  gradients, found = run(spoiled(arrays(), names))
  np.testing.assert_array_equal(found[0], early)
  if names == "q":
    reached = np.isnan(found[1]).all(axis=(0, 2, 3))
    np.testing.assert_array_equal(reached, np.arange(N - BAD.start) < 4)
    np.testing.assert_array_equal(found[2], state)
  else:
    assert np.isnan(found[1]).all() and np.isnan(found[2]).all()
  for name, gradient in gradients.items():
    np.testing.assert_array_equal(gradient, expected[name], err_msg=name)
