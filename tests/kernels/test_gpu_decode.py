"""The GPU kernel of decoding in Pallas's simulator, races included."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import aot, choice, decode_attention
from pallas_kernels.decode_attention import operands as forms
from tests.kernels import oracle
from tests.kernels.gpu import rounded, simulated

BATCH, GROUPS, N = 3, 2, 256


@dataclasses.dataclass(frozen=True)
class Call:
  """A way of reading, and what else is on; `how` names an argument or None."""

  how: str | None
  share: int = 2
  tokens: int = 2
  causal: bool = True
  bias: bool = False
  soft_cap: float | None = None
  heads_first: bool = False
  width: int = 64
  v_width: int = 64
  block: int = 64
  splits: int = 2


CALLS = (
  # Every mask and number there is; more blocks than stages.
  Call("blocks", bias=True, soft_cap=5.0, splits=1),
  Call("tokens"),
  Call("tokens", bias=True, tokens=1, causal=False, v_width=128),
  # Wide blocks, and padded rows: a row for each of 7 heads and 3 tokens.
  Call(None, share=7, tokens=3, block=128, heads_first=True, width=128),
  Call("blocks", tokens=1, causal=False, heads_first=True, width=256, splits=3),
)


def arrays(call):
  """Float32 arrays of numbers that bfloat16 has."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rounded(rng.normal(size=shape))
  heads = GROUPS * call.share
  found = {
    "q": draw(BATCH, call.tokens, heads, call.width),
    "k": draw(BATCH, N, GROUPS, call.width),
    "v": draw(BATCH, N, GROUPS, call.v_width),
    "lengths": np.array([N, N // 2 + 9, 0]),
  }
  if call.bias:
    hidden = rng.random((BATCH, heads, N)) < 0.2
    bias = rng.normal(size=hidden.shape).astype(np.float32)
    found["bias"] = np.where(hidden, -np.inf, bias).astype(np.float32)
  return found


def selection(call):
  """Arguments of a selection, and which entries it shows, `[B, G, n]`."""
  shown = np.ones((BATCH, GROUPS, N), bool)
  if call.how is None:
    return {}, shown
  rng = np.random.default_rng(1)
  unit = call.block if call.how == "blocks" else 1
  m = 3 if call.how == "blocks" else 70
  draw = lambda: rng.permutation(N // unit)[:m]
  listed = np.stack([[draw() for _ in range(GROUPS)] for _ in range(BATCH)])
  counts = np.array([[m, 2], [1, m], [2, 0]])
  shown[:] = False
  for b, g in np.ndindex(BATCH, GROUPS):
    for j in listed[b, g][: counts[b, g]]:
      shown[b, g, unit * j : unit * (j + 1)] = True
  return {call.how: listed, "counts": counts}, shown


def visible(call, lengths, shown):
  """bool `[B, H, t, n]`."""
  back = np.arange(call.tokens - 1, -1, -1) * call.causal
  end = lengths[:, None] - back
  mask = (np.arange(N) < end[..., None])[:, None]
  return mask & np.repeat(shown, call.share, 1)[:, :, None]


def run(call, given, where):
  """Output and log-sum-exp of the simulated kernel."""
  given = dict(given)
  for name in "qkv":
    given[name] = jnp.asarray(given[name], jnp.bfloat16)
  if call.heads_first:
    given |= {name: jnp.swapaxes(given[name], 1, 2) for name in "kv"}
  attend = functools.partial(
    decode_attention, causal=call.causal, soft_cap=call.soft_cap,
    splits=call.splits, block_size=call.block, heads_first=call.heads_first,
    return_lse=True, implementation="gpu_races",
  )  # fmt: skip
  out, lse = jax.jit(attend)(**given, **where)
  return np.asarray(out, np.float32), np.asarray(lse)


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.how}")
def test_decoding_follows_the_formulas_without_races(call, gpu_races):
  """Also where entries that are hidden from some queries are not finite."""
  given, (where, shown) = arrays(call), selection(call)
  mask = visible(call, given["lengths"], shown)
  names = ("q", "k", "v")
  expected = oracle.attention(
    *(given[name] for name in names), mask, bias=given.get("bias"),
    soft_cap=call.soft_cap,
  )  # fmt: skip
  first, last = N // 2 + 8, N // 2 + 40
  spoilt = {name: given[name].copy() for name in "kv"}
  spoilt["k"][1, last:] = np.nan
  spoilt["v"][1, first:] = np.inf
  out, lse = run(call, given | spoilt, where)
  # The last of the new tokens sees the first of the bad entries.
  seen = mask[1, :, :, first]
  if call.bias:
    seen = seen & ~np.isneginf(given["bias"][1, :, None, first])
  for found, right in ((out, expected[0]), (np.swapaxes(lse, 1, 2), None)):
    assert np.isnan(found[1].swapaxes(0, 1)[seen]).all()
    if right is None:
      right = np.swapaxes(expected[1], 1, 2)
    good = np.ones(right.shape[:3], bool)
    good[1] = ~np.swapaxes(seen, 0, 1)
    tolerance = 1e-2 if found is out else 2e-5
    np.testing.assert_allclose(found[good], right[good], atol=tolerance)


def test_it_says_what_it_cannot_run():
  def reason(block=128, n=256, width=64, tokens=1, dtype=jnp.bfloat16):
    q = jax.ShapeDtypeStruct((1, tokens, 16, width), dtype)
    k = jax.ShapeDtypeStruct((1, n, 1, width), dtype)
    call = functools.partial(decode_attention, block_size=block)
    blocks = jax.ShapeDtypeStruct((1, 1, 2), jnp.int32)
    with aot.compiling_for("gpu"), pytest.raises(NotImplementedError) as error:
      jax.eval_shape(
        lambda q, k, blocks: call(q, k, k, blocks=blocks, implementation="gpu"),
        q, k, blocks,
      )  # fmt: skip
    return str(error.value)

  assert "head size 80, the kernel needs a multiple of 64" in reason(width=80)
  assert "head size 320" in reason(width=320)
  assert "float32, the GPU kernels take bfloat16" in reason(dtype=jnp.float32)
  assert "80 rows, the kernel takes at most 64" in reason(tokens=5)
  assert "block_size is 96 and the cache has 192 entries" in reason(96, 192)
  assert "the cache has 200 entries" in reason(n=200)


def test_the_target_decides_what_is_picked():
  q = jax.ShapeDtypeStruct((1, 1, 8, 64), jnp.bfloat16)
  k = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
  lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
  given = forms.Operands(q, k, k, lengths, None, None, None, None)
  options = forms.Options(1.0, None, 128, False, 1)
  known = choice.implementations("pallas_kernels.decode_attention")
  with aot.compiling_for("gpu"):
    assert choice.choose(known, (given, options)).name == "gpu"
    short = given._replace(k=k.update(shape=(1, 250, 2, 64)))
    assert choice.choose(known, (short, options)).name == "xla"
