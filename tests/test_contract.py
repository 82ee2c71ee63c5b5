"""The laws of the design, held by every registered recipe.

Recipes come from the registry, models from `tests.contract.hosts`; what a law
must adapt to (a restored output, a grid, a key, what a budget is of) is read
from the slots, never from a recipe's name. Laws over `EVERY` and `FIRST`
hold in every kind of model. Language recipes are compared with
slow references, layer by layer, in `tests/cache/test_contract.py`.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.contract import hosts, probes
from tests.contract.case import BATCH, KEEP, KEY
from tests.contract.decoder_runs import plain
from tests.contract.hosts import (
  DecoderHost,
  Host,
  VisionHost,
  VisionLanguageHost,
)
from tests.contract.runs import case
from tokjax import budgets, recipes
from tokjax.analysis import cost
from tokjax.signals import Rows
from tokjax.slots import Slots
from tokjax.tokens import Kind

CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def pairs(kind: type = Host, only: slice = slice(None)):
  """(recipe, host) parameters; those of one recipe share a worker."""
  return [
    pytest.param(
      name,
      host.name,
      marks=pytest.mark.xdist_group(f"contract-{name}"),
      id=f"{name}-{host.name}",
    )
    for name in recipes.names()
    for host in hosts.taking(name, kind)[only]
  ]


def over(found):
  return pytest.mark.parametrize(("recipe", "host"), found, scope="module")


# First: the first host of its kind, for laws that one is enough for.
EVERY = over(pairs())
TOWERS = pairs(VisionLanguageHost)
FIRST = over(pairs(VisionHost, only=slice(1)) + pairs(DecoderHost) + TOWERS)
VISION = over(pairs(VisionHost))
# The smaller one, for laws that compile programs of their own.
LAST_VISION = over(pairs(VisionHost, only=slice(-1, None)))


def of_each_module(found):
  """One recipe of each module, whose others are made of the same rules."""
  module = lambda pair: recipes.find(pair.values[0]).build.__module__
  return list({module(pair): pair for pair in found}.values())


EACH_MODULE = over(of_each_module(pairs(VisionHost, only=slice(-1, None))))
NAMES = pytest.mark.parametrize("recipe", hosts.names(VisionHost))
ALL = pytest.mark.parametrize("recipe", recipes.names())


def plans_of(recipe, host):
  """The probed plans of every example: (plan, example, its values)."""
  for i, plan in enumerate(case(recipe, host).clean["plans"]):
    for b in range(BATCH):
      yield i, b, {name: value[b] for name, value in plan.items()}


def same(a, b) -> bool:
  """Whether two results are equal bit for bit."""
  return all(
    np.array_equal(x, y)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def close(a, b) -> None:
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), a, b)


def example(tree, i: int):
  """One example of a batch."""
  return jax.tree.map(lambda v: v[i], tree)


def finite(tree) -> bool:
  return all(bool(np.isfinite(x).all()) for x in jax.tree.leaves(tree))


# Law 1: static out, adaptive inside.


@VISION
def test_output_length_follows_from_the_schedule(recipe, host):
  c = case(recipe, host)
  free, depth = c.host.config.num_patches, c.host.config.depth
  left = c.clean["tokens"]["x"].shape[1] - c.host.protected
  if c.slots.program is not None:
    assert 0.3 < left / free < 0.7, "a program keeps about half, as asked"
  elif c.stays:
    assert left == free
  else:
    counts = c.slots.counts(free, depth)
    assert left == min(n for after in counts for n in after if n is not None)
    assert left < free
  assert bool(c.clean["plans"]) == bool(c.slots.reduce)


@EVERY
def test_two_calls_of_one_shape_compile_once(recipe, host):
  c = case(recipe, host)
  assert finite(c.clean["output"])
  assert c.clean["output"].shape == c.output_shape
  assert c.compiled == 1


# Law 2: pure.


@EACH_MODULE
def test_jit_equals_eager(recipe, host):
  """Operations of an eager call are compiled one by one: a hundred programs."""
  c = case(recipe, host)
  eager = c.forward(c.params, c.inputs[:1], KEY(0))
  for name, value in eager.items():
    # The first example has the key that it gets alone.
    close(example(value, 0), example(c.clean[name], 0))


@LAST_VISION
def test_a_batch_equals_each_example_alone(recipe, host):
  c = case(recipe, host)
  for i in range(BATCH):
    # Rolled, so that the example is the first one, whose key it gets alone.
    batch = c.run(jnp.roll(c.inputs, -i, axis=0))
    alone = c.single(c.params, c.inputs[i : i + 1], KEY(0))
    for name in ("output", "tokens"):
      close(example(batch[name], 0), example(alone[name], 0))


@FIRST
def test_the_order_of_a_batch_changes_nothing(recipe, host):
  c = case(recipe, host)
  if c.slots.needs_key:
    pytest.skip("examples have keys of their own")
  rolled = c.run(jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), c.inputs))
  for i in range(BATCH):
    close(example(rolled["output"], i - 1), example(c.clean["output"], i))


@LAST_VISION
def test_gradients_are_finite(recipe, host):
  c = case(recipe, host)
  of_params, of_x = c.gradients
  assert finite(of_params["encoder"])
  assert finite(of_x)
  kernels = of_params["encoder"]["block_0"]["mlp"]
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(kernels))
  assert np.abs(of_x).max() > 0


@FIRST
def test_same_key_same_result(recipe, host):
  c = case(recipe, host)
  assert same(c.run(c.inputs, seed=0), c.clean)
  if not c.slots.needs_key:
    assert same(c.run(c.inputs, seed=1), c.clean)


@NAMES
def test_a_random_recipe_asks_for_a_key(recipe):
  host = hosts.taking(recipe, VisionHost)[0]
  slots = recipes.get(recipe, keep=KEEP)
  image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  init = host.build(slots).init
  if slots.needs_key:
    with pytest.raises(ValueError, match=f"(?s){recipe}.*key="):
      jax.eval_shape(init, KEY(0), image)
  else:
    jax.eval_shape(init, KEY(0), image)


# Law 3: padding never leaks.


def masked(found):
  """Those that take padding."""
  return [pair for pair in found if case(*pair.values).takes_mask]


def ragged():
  """Pairs that are compared with examples alone, which is another program.

  Caches and attention alone are, ragged as here, compared with slow references
  of one example in `tests/cache/test_contract.py`; of those, one of each module
  is run in a decoder, too.
  """
  decoders = pairs(DecoderHost)
  caches = [p for p in decoders if not case(*p.values).slots.reduce]
  reduces = [p for p in decoders if p not in caches]
  found = pairs(VisionHost, only=slice(1)) + reduces + TOWERS
  return masked(found + of_each_module(caches))


@over(ragged())
def test_padded_equals_alone(recipe, host):
  for padded, alone in case(recipe, host).padded_and_alone():
    for name, values in padded.items():
      assert values.shape == alone[name].shape
      np.testing.assert_allclose(values, alone[name], err_msg=name, **CLOSE)


@over(masked(pairs()))
def test_garbage_in_padding_changes_nothing(recipe, host):
  one, other = case(recipe, host).with_garbage()
  assert finite(one)
  assert same(one, other)


@over(masked(pairs(VisionHost, only=slice(-1, None))))
def test_padding_is_not_learned_from(recipe, host):
  c = case(recipe, host)
  _, (of_params, of_x) = c.with_nan
  assert finite(of_params["encoder"])
  assert finite(of_x)
  real = c.padding.batch.mask
  assert not of_x[~real].any()


@over(masked(pairs(VisionHost)))
def test_examples_of_one_token_or_none_have_a_result(recipe, host):
  c = case(recipe, host)
  tokens, _ = c.with_nan
  for example, patches in ((3, 1), (4, 0)):
    free = tokens["mask"][example][c.host.protected :]
    assert free.sum() == patches
    size = tokens["size"][example][tokens["mask"][example]]
    np.testing.assert_allclose(size.sum(), patches + c.host.protected)


@pytest.mark.parametrize(
  ("recipe", "host"),
  [p for p in pairs(VisionHost) if not case(*p.values).takes_mask],
)
def test_a_recipe_that_needs_a_grid_refuses_a_mask(recipe, host):
  c = case(recipe, host)
  image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  mask = jax.ShapeDtypeStruct((1, c.host.config.num_patches), jnp.bool_)
  with pytest.raises(ValueError, match=f"(?s){recipe}.*mask"):
    jax.eval_shape(
      lambda x, mask: c.model.apply(
        {"params": c.params}, x, mask=mask, key=KEY(0)
      ),
      image,
      mask,
    )


@FIRST
def test_nan_stays_in_its_example(recipe, host):
  c = case(recipe, host)
  params, inputs = c.nan_inputs
  results = c.run(inputs, params=params)
  for i in (0, 2):
    for name in results.keys() & {"output", "tokens"}:
      assert same(example(results[name], i), example(c.clean[name], i))


# Law 4: provenance.


@VISION
def test_plans_are_their_matrices(recipe, host):
  for i, b, plan in plans_of(recipe, host):
    m, n = plan["matrix"].shape
    expected = plan["matrix"] @ np.asarray(probes.fixed(0, n, 3))
    np.testing.assert_allclose(
      plan["applied"], expected, err_msg=f"plan {i}, example {b}", **CLOSE
    )
    assert plan["applied"].shape == (m, 3)
    assert not plan["matrix"][~plan["valid"]].any()


@VISION
def test_size_is_conserved_and_what_is_dropped_is_known(recipe, host):
  for i, b, plan in plans_of(recipe, host):
    mass = np.abs(np.asarray(probes.fixed(2, plan["share"].shape[1])))
    known = plan["total"].sum() + mass[plan["dropped"]].sum()
    np.testing.assert_allclose(
      known, mass.sum(), rtol=1e-5, err_msg=f"plan {i}, example {b}"
    )
    np.testing.assert_allclose(plan["total"], plan["share"] @ mass, rtol=1e-5)


@VISION
def test_restore_gives_members_their_output(recipe, host):
  for i, b, plan in plans_of(recipe, host):
    message = f"plan {i}, example {b}"
    m = plan["matrix"].shape[0]
    y = np.asarray(probes.fixed(1, m, 3))
    np.testing.assert_allclose(
      plan["restored"], plan["back"] @ y, err_msg=message, **CLOSE
    )
    share, weight = plan["share"], plan["matrix"]
    mean = plan["valid"] & np.isclose(weight.sum(axis=1), 1, atol=1e-5)
    if set(np.unique(share)) <= {0, 1} and mean.any():
      # Each source is in one output at most, and these are means of theirs.
      again = (weight @ plan["restored"])[mean]
      np.testing.assert_allclose(again, y[mean], err_msg=message, **CLOSE)
      assert not plan["restored"][plan["dropped"]].any()


@VISION
def test_plans_compose_to_the_product_of_their_matrices(recipe, host):
  c = case(recipe, host)
  whole = c.clean["whole"]
  if whole is None:
    assert c.around or not c.clean["plans"]
    return
  for b in range(BATCH):
    product = np.eye(c.host.protected + c.host.config.num_patches)
    for plan in c.clean["plans"]:
      product = plan["matrix"][b] @ product
    np.testing.assert_allclose(whole[b], product, **CLOSE)


# Law 5: identity.


@over(
  pairs(VisionHost, only=slice(1)) + TOWERS
  + [pair for pair in pairs(DecoderHost) if case(*pair.values).keeps_all]
)
def test_keeping_everything_is_the_model_itself(recipe, host):
  c = case(recipe, host)
  results = c.keeping_all()
  if results is not None:
    whole, plain = results
    assert same(whole, plain) if c.exact else close(whole, plain) is None


# Law 6: protection.


@VISION
def test_protected_tokens_survive_untouched_and_in_front(recipe, host):
  p = case(recipe, host).host.protected
  for i, b, plan in plans_of(recipe, host):
    for name in ("matrix", "share", "back"):
      values, message = plan[name], f"{name} of plan {i}, example {b}"
      np.testing.assert_array_equal(values[:p, :p], np.eye(p), message)
      assert not values[:p, p:].any(), message
      assert not values[p:, :p].any(), message
    assert plan["valid"][:p].all()


# Law 7: positions travel.


@VISION
def test_positions_kinds_and_sizes_travel(recipe, host):
  c = case(recipe, host)
  tokens = c.clean["tokens"]
  start = c.host.tokens(1, c.host.config.num_patches)
  if c.slots.program is not None:
    # Its tokens are those of another input; they must still be apart.
    for position in tokens["position"][:, c.host.protected :]:
      assert len(np.unique(position, axis=0)) == len(position)
    return
  for b in range(BATCH):
    anchor = np.arange(start.num_tokens)
    size = np.ones((start.num_tokens,))
    for plan in [] if c.stays else c.clean["plans"]:
      anchor = anchor[plan["anchor"][b]]
      size = plan["share"][b] @ size
    np.testing.assert_array_equal(
      tokens["position"][b], start.position[0][anchor]
    )
    np.testing.assert_array_equal(tokens["kind"][b], start.kind[0][anchor])
    np.testing.assert_allclose(tokens["size"][b], size, rtol=1e-4, atol=1e-5)
    real = np.ones(len(anchor), bool)
    if tokens["mask"] is not None:
      real = tokens["mask"][b]
    assert len(set(anchor[real])) == real.sum(), "no two share a place"
    assert size[real].min() > 0


# Law 8: honest cost.


@functools.cache
def cost_of(host: VisionHost, slots: Slots) -> cost.Cost:
  """Of the forward pass of one image in a wider model."""
  model = host.build(slots, width=64, mlp_dim=256)
  side = host.config.image_size
  image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)

  def run(params, image):
    return model.apply(params, image, key=KEY(0))[0]

  params = jax.eval_shape(lambda x: model.init(KEY(0), x, key=KEY(0)), image)
  return cost.measure(run, params, image)


@LAST_VISION
def test_the_compiled_program_costs_less(recipe, host):
  c = case(recipe, host)
  reduced, whole = cost_of(c.host, c.slots), cost_of(c.host, Slots())
  assert reduced.exact, "a loop of unknown length hides what the recipe costs"
  if c.slots.reduce or c.slots.program is not None:
    assert reduced.flops < whole.flops
  elif isinstance(c.slots.attend, nn.Module):
    assert reduced.flops > whole.flops, "what is learned is not free"
  else:
    np.testing.assert_allclose(reduced.flops, whole.flops, rtol=0.05)


@over(
  [pair for pair in pairs(DecoderHost) if case(*pair.values).stores_less]
)
def test_less_is_stored_than_in_a_full_cache(recipe, host):
  c = case(recipe, host)
  full = plain(c.host)["stored"]
  assert (c.clean["stored"] > 0).all()
  assert (c.clean["stored"] < full).all()


# Law 9: errors early.


@ALL
def test_a_recipe_has_a_host(recipe):
  assert hosts.hosts_of(recipe), "no model in tests.contract.hosts takes it"


@NAMES
def test_a_model_that_lacks_a_signal_is_refused(recipe):
  slots = recipes.get(recipe, keep=KEEP)
  asked = [q for r in slots.reduce for q in r.asks if isinstance(q, Rows)]
  for host in hosts.VISION:
    has = {*host.config.kinds, Kind.PATCH}
    lacking = {k for q in asked for k in q.of.kinds} - has
    if lacking:
      with pytest.raises(ValueError, match=recipe) as error:
        host.build(slots)
      assert any(kind.name in str(error.value) for kind in lacking)
    else:
      host.build(slots)


@NAMES
def test_a_schedule_that_runs_out_of_tokens_is_refused(recipe):
  if "budget" not in recipes.find(recipe).options:
    assert not recipes.get(recipe).reduce
    return
  slots = recipes.get(recipe, budget=budgets.Constant(40))
  with pytest.raises(budgets.BudgetError, match=f"{recipe}.*block"):
    hosts.taking(recipe, VisionHost)[0].build(slots)


@ALL
@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, float("nan")])
def test_a_keep_that_cannot_be_is_refused(recipe, keep):
  with pytest.raises(ValueError, match=r"keep=.*\(0, 1\]"):
    recipes.get(recipe, keep=keep)


@ALL
def test_an_unknown_option_is_refused(recipe):
  with pytest.raises(TypeError, match=f"{recipe}.*'nonsense'.*keep"):
    recipes.get(recipe, nonsense=1)


def test_an_unknown_recipe_is_refused_with_a_hint():
  with pytest.raises(KeyError, match="did you mean tome"):
    recipes.get("tomee")


@NAMES
def test_one_token_runs_or_is_refused(recipe):
  host = hosts.taking(recipe, VisionHost)[-1]
  slots = recipes.get(recipe, keep=KEEP)
  if not host.admits(slots, image_size=2):
    with pytest.raises(ValueError, match=recipe):
      host.build(slots, image_size=2)
    return
  model = host.build(slots, image_size=2)
  params = host.params(model)
  output, out = jax.jit(model.apply)(
    {"params": params}, jnp.ones((1, 2, 2, 3)), key=KEY(0)
  )
  assert finite(output)
  assert out["tokens"].num_tokens == host.protected + 1


# Dtypes.


@LAST_VISION
def test_bfloat16_runs(recipe, host):
  c = case(recipe, host)
  model = c.host.build(c.slots, jnp.bfloat16)

  @jax.jit
  def run(params, images):
    output, out = model.apply({"params": params}, images, key=KEY(0))
    plans = [plan for made in out["plans"] for plan in made]
    return output, out, [jax.vmap(probes.shares)(plan) for plan in plans]

  output, out, shares = run(c.params, c.inputs[:1])
  for i, (arrives, kept) in enumerate(shares):
    message = f"plan {i}: shares of a token's size must add up to 1"
    np.testing.assert_allclose(arrives, kept, rtol=1e-5, err_msg=message)
  assert output.dtype == out["tokens"].x.dtype == jnp.bfloat16
  assert out["tokens"].x.shape == (1, *c.clean["tokens"]["x"].shape[1:])
  assert out["tokens"].size.dtype == jnp.float32, "sizes must stay exact"
  assert finite(output.astype(jnp.float32))
