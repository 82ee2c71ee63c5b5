"""docs/own_model.md: its code runs and gives the tokens of tokjax's encoder."""

import dataclasses
import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import layout as layouts
from tests.contract.case import draw_params
from tests.contract.hosts import SMALL, VisionHost
from tokjax import Kind, Reduce, Slots, budgets, foreign, recipes
from tokjax.attention import BlockSparse
from tokjax.reduce.rules import keep_top
from tokjax.signals import Keys

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOC = (ROOT / "docs/own_model.md").read_text()
HOST = VisionHost("vit", dataclasses.replace(SMALL, activation="gelu_tanh"))
DEPTH = SMALL.depth
KEY = jax.random.key(4)
TOKENS = HOST.tokens(2, 24)
MASK = jnp.arange(25)[None] < jnp.asarray([25, 15])[:, None]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@functools.cache
def shown(name: str) -> dict:
  """What a block of the document defines."""
  found = re.search(
    rf"<!-- {name} -->\n```python\n(.*?)```\n<!-- end -->", DOC, re.DOTALL
  )
  assert found, f"own_model.md has no block {name!r}"
  names = {"__name__": f"own_model_{name}"}
  exec(compile(found.group(1), f"own_model.md: {name}", "exec"), names)
  return names


def weights():
  """Of tokjax's encoder, which the others are given too."""
  encoder = HOST.encoder(Slots())
  init = lambda t: encoder.init(jax.random.key(0), t, grid=(4, 6))["params"]
  return draw_params(jax.eval_shape(init, TOKENS))


def blocks():
  """The same weights, block by block, with short names."""
  out = []
  for i in range(DEPTH):
    block = weights()[f"block_{i}"]
    out.append({**block["attention"], **block["mlp"],
                "norm1": block["norm1"], "norm2": block["norm2"]})  # fmt: skip
  return out


def by_head(p):
  """Projections as Flax's attention holds them."""
  heads = {}
  for name in ("query", "key", "value"):
    heads[name] = {"kernel": p[name]["kernel"].reshape(32, 2, 16),
                   "bias": p[name]["bias"].reshape(2, 16)}  # fmt: skip
  kernel = p["out"]["kernel"].reshape(2, 16, 32)
  return {**heads, "out": {"kernel": kernel, "bias": p["out"]["bias"]}}


@functools.cache
def expected(slots, masked=False):
  """Tokens and plans of tokjax's own encoder."""
  encoder, tokens = HOST.encoder(slots), TOKENS
  if masked:
    tokens = tokens.replace(mask=MASK)
  run = lambda p, tokens: encoder.apply(
    {"params": p}, tokens, grid=(4, 6), key=KEY
  )
  tokens, out = jax.jit(run)(weights(), tokens)
  return tokens, out["plans"]


def in_jax(slots, x=TOKENS.x, **options):
  params = blocks()

  def run(x):
    with jax.numpy_rank_promotion("allow"):
      return shown("jax")["encode"](params, x, slots, key=KEY, **options)

  return jax.jit(run)(x)


def in_linen(slots, x=TOKENS.x):
  params = {}
  for i, p in enumerate(blocks()):
    params[f"CheckpointBlock_{i}"] = {
      "LayerNorm_0": p["norm1"], "LayerNorm_1": p["norm2"],
      "MultiHeadDotProductAttention_0": by_head(p), "Dense_0": p["fc1"],
      "Dense_1": p["fc2"],
    }  # fmt: skip
  model = shown("linen")["Encoder"](slots, DEPTH)
  return jax.jit(lambda p, x: model.apply({"params": p}, x, key=KEY))(params, x)


def in_nnx(slots, x=TOKENS.x):
  made = []
  for p in blocks():
    block = shown("nnx")["Block"](32, 2, nnx.Rngs(0))
    given = {**{n: p[n] for n in ("norm1", "norm2", "fc1", "fc2")},
             "attention": by_head(p)}  # fmt: skip
    nnx.update(block, given)
    made.append(block)
  encode = shown("nnx")["encode"]
  return nnx.jit(lambda m, x: encode(m, x, slots, key=KEY))(nnx.List(made), x)


def same(got, want):
  (tokens, plans), (wanted, wanted_plans) = got, want
  for name in ("x", "size"):
    np.testing.assert_allclose(
      getattr(tokens, name), getattr(wanted, name), err_msg=name, **CLOSE
    )
  np.testing.assert_array_equal(tokens.kind, wanted.kind)
  assert [len(p) for p in plans] == [len(p) for p in wanted_plans]
  for ours, theirs in zip(sum(plans, []), sum(wanted_plans, []), strict=True):
    np.testing.assert_array_equal(ours.anchor, theirs.anchor)


@pytest.mark.parametrize("run", [in_jax, in_linen, in_nnx])
@pytest.mark.parametrize("name", ["tome", "evit"])
def test_tokens_are_those_of_tokjax_s_encoder(name, run):
  slots = recipes.get(name, keep=0.5)
  got = run(slots)
  assert got[0].num_tokens < TOKENS.num_tokens
  same(got, expected(slots))


@pytest.mark.parametrize("name", ["tome", "kmedoids", "random"])
def test_padding_may_hold_anything(name):
  """Also with rules that ask an earlier block or are random."""
  slots = recipes.get(name, keep=0.5)
  x = jnp.where(MASK[:, :, None], TOKENS.x, jnp.nan)
  got, _ = in_jax(slots, x, mask=MASK)
  want, _ = expected(slots, masked=True)
  np.testing.assert_array_equal(got.mask, want.mask)
  real = np.asarray(got.mask)
  np.testing.assert_allclose(got.x[real], want.x[real], **CLOSE)
  np.testing.assert_allclose(got.size[real], want.size[real], **CLOSE)


def walk(slots, depth=2, x=TOKENS.x, give=("q", "k", "v"), **options):
  """A passage through blocks that only attend, with heads of 16."""
  options = {"kinds": (Kind.CLASS,), **options}
  passage = foreign.start(slots, x, depth=depth, **options)
  for _ in range(depth):
    passage = passage.enter()
    q = passage.x.reshape(*passage.x.shape[:2], 2, 16)
    y = jax.nn.dot_product_attention(q, q, q, bias=passage.bias)
    weight = jnp.einsum("bmhk,bnhk->bhmn", q, q) / 4
    every = {"q": q, "k": q, "v": q, "attention": jax.nn.softmax(weight)}
    given = {name: every[name] for name in give}
    x = passage.x + y.reshape(passage.x.shape)
    passage = passage.attended(x, **given)
    passage = passage.leave(passage.x)
  return passage.finish()


def test_positions_travel_and_gradients_are_finite():
  slots = recipes.get("tome", keep=0.5)
  place = jnp.arange(25.0)[None, :, None] + jnp.zeros((2, 25, 2))

  def loss(x):
    tokens, _ = walk(slots, x=x, position=place)
    return (tokens.x**2).sum(), tokens

  gradient, tokens = jax.jit(jax.grad(loss, has_aux=True))(TOKENS.x)
  assert tokens.position.shape == (2, 13, 2)
  for position in tokens.position[:, :, 0]:
    assert position[0] == 0
    assert len(np.unique(position)) == 13
  np.testing.assert_allclose(tokens.size.sum(axis=1), 25)
  assert np.isfinite(gradient).all()
  assert np.abs(gradient).max() > 0


def test_vmap_equals_a_loop():
  slots = recipes.get("evit", keep=0.5)
  two = jnp.stack([TOKENS.x, TOKENS.x[::-1] + 1.0])
  run = lambda x: walk(slots, x=x)[0].x
  want = jnp.stack([*map(jax.jit(run), two)])
  got = jax.jit(jax.vmap(run))(two)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_given_map_answers_for_rows():
  slots = recipes.get("evit", keep=0.5)
  run = lambda x, give: walk(slots, x=x, give=give)[0].x
  run = jax.jit(run, static_argnames="give")
  given, own = (run(TOKENS.x, give) for give in (("attention",), ("q", "k")))
  np.testing.assert_allclose(given, own, **CLOSE)


@pytest.mark.parametrize(
  ("name", "give", "message"),
  [
    ("tome", ("q",), "'tome' asks Keys of block 0.*pass k= to attended"),
    ("evit", ("k",), "'evit' asks Rows of block 1.*q and k; pass q="),
  ],
)
def test_a_signal_that_is_not_given_is_named(name, give, message):
  with pytest.raises(ValueError, match=message):
    walk(recipes.get(name, keep=0.5), give=give)


OWN = Slots(Reduce(keep_top(Keys()), budgets.Once(0.5, layer=1)), name="own")


@pytest.mark.parametrize(
  ("slots", "options", "message"),
  [
    (recipes.get("mctf"), {}, "'mctf'.*inside attention"),
    (recipes.get("dynamicvit"), {}, "'dynamicvit'.*trained part"),
    (recipes.get("expedit"), {"grid": (4, 6)}, "'expedit'.*gives tokens back"),
    (recipes.get("sparsifiner"), {}, "fills 'attend'.*foreign encoder"),
    (recipes.get("snapkv"), {}, "fills 'cache'"),
    (recipes.get("evit"), {"kinds": ()}, r"\['CLASS'\].*kinds= names \[\]"),
    (recipes.get("random"), {}, "is random: pass key="),
    (recipes.get("avgpool"), {}, "complete grid"),
    (recipes.get("stride"), {"grid": (5, 5)}, r"grid=\(5, 5\): has 25 places"),
    (recipes.get("fastv"), {}, "'fastv'.*VISUAL"),
    (
      Slots(dataclasses.replace(OWN.reduce[0], unmerged=True), name="own"), {},
      "'own'.*unmerged=",
    ),
    (OWN, {}, "'own'.*asks Keys of the block ahead.*at='mlp'"),
    (recipes.get("tome", budget=budgets.Constant(20)), {}, "at most 12"),
  ],
)
def test_what_cannot_be_is_refused_at_the_start(slots, options, message):
  with pytest.raises(ValueError, match=message):
    walk(slots, **options)


def test_steps_out_of_order_are_refused():
  start = foreign.start(Slots(), TOKENS.x, depth=1)
  with pytest.raises(ValueError, match="attended comes behind enter"):
    start.attended(TOKENS.x)
  with pytest.raises(ValueError, match="only 0 blocks were left"):
    start.finish()
  entered = start.enter()
  with pytest.raises(ValueError, match=r"must be \(2, 25, 32\)"):
    entered.attended(TOKENS.x[:, :3])
  left = entered.attended(TOKENS.x).leave(TOKENS.x)
  with pytest.raises(ValueError, match="block 1 is entered"):
    left.enter()
  with pytest.raises(ValueError, match="has not been called"):
    _ = entered.attention(nn.dot_product_attention).qkv


def test_block_sparse_attention_in_stock_modules():
  names = shown("sparse")
  x, n = TOKENS.x, 25
  at = jnp.arange(n)
  pattern = layouts.Sinks(1) | layouts.Window(16)
  real = MASK[:, None, None, :]
  seen = pattern(0, at[:, None], at[None])[None, None] & real
  params = by_head(blocks()[0])
  stock = nn.MultiHeadDotProductAttention(2)
  want = stock.apply({"params": params}, x, mask=seen)
  linen = names["linen"].apply({"params": params}, x, mask=real)
  np.testing.assert_allclose(linen, want, **CLOSE)
  module = names["module"]
  nnx.update(module, params)
  np.testing.assert_allclose(module(x, mask=real), want, **CLOSE)
  # In a passage, the bias goes with it.
  passage = foreign.start(Slots(), x, depth=1, mask=MASK)
  inside = nn.MultiHeadDotProductAttention(
    2, attention_fn=passage.attention(names["near"])
  )
  got = inside.apply({"params": params}, jnp.where(MASK[:, :, None], x, 0))
  np.testing.assert_allclose(got[MASK], want[MASK], **CLOSE)


def test_layouts_and_causal_calls():
  q = TOKENS.x.reshape(2, 25, 2, 16)
  pattern = layouts.Causal() & layouts.Window(4)
  layout = layouts.from_pattern(pattern, q_len=25, block_q=8, block_k=8)
  listed = foreign.BlockSparseAttention(layout)
  by_layout = jax.jit(lambda q: listed(q, q, q))(q)
  near = foreign.BlockSparseAttention(layouts.Window(4), block=8)
  near = jax.jit(functools.partial(near, is_causal=True))
  by_pattern = near(q, q, q)
  np.testing.assert_allclose(by_layout, by_pattern, rtol=1e-6, atol=1e-6)
  chosen = foreign.BlockSparseAttention(
    BlockSparse(rule=layouts.TopK(4), block_q=8, block_k=8)
  )
  want = jax.nn.dot_product_attention(q, q, q)
  np.testing.assert_allclose(jax.jit(chosen)(q, q, q), want, **CLOSE)


def test_what_a_layout_cannot_carry_out_is_refused():
  q = TOKENS.x.reshape(2, 25, 2, 16)
  near = foreign.BlockSparseAttention(layouts.Window(4), block=8)
  pairs = jnp.ones((2, 1, 25, 25), bool)
  with pytest.raises(ValueError, match=r"mask has shape.*\[2 or 1, 1, 1, 25\]"):
    near(q, q, q, mask=pairs)
  with pytest.raises(ValueError, match="dropout_rate=0.1"):
    near(q, q, q, dropout_rate=0.1, deterministic=False)
  with pytest.raises(ValueError, match="module=.*does not have this option"):
    near(q, q, q, module=object())
  with pytest.raises(ValueError, match="sees='near'"):
    foreign.BlockSparseAttention("near")
  with pytest.raises(ValueError, match="is_causal=True.*BlockSparse"):
    foreign.BlockSparseAttention(BlockSparse())(q, q, q, is_causal=True)
