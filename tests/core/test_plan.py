"""The algebra of plans, against dense matrices in numpy."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokjax.plan import Assignment, Mixture, move
from tokjax.tokens import Kind, Tokens

N = 9  # one shape of sources, so that operations compile once
LOWERINGS = ("gather", "scatter", "onehot")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@st.composite
def assignments(draw, n=N, m=None):
  """A plan, and what it should do: [(members, weights)] an output, or None."""
  m = draw(st.sampled_from([1, 5, n])) if m is None else m
  order = draw(st.permutations(range(n)))
  anchor, rest = order[:m], order[m:]
  into = [draw(st.integers(0, m)) for _ in rest]
  valid = None
  if draw(st.booleans()):
    valid = [draw(st.booleans()) for _ in anchor]
    into = [m if i < m and not valid[i] else i for i in into]
  size = [draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])) for _ in range(n)]
  plan = Assignment(
    jnp.array(anchor),
    jnp.array(rest, jnp.int32) if rest else None,
    jnp.array(into, jnp.int32) if rest else None,
    None if valid is None else jnp.array(valid),
    num_sources=n,
  )
  members = np.zeros((m, n), np.float32)
  for j, a in enumerate(anchor):
    members[j, a] = valid is None or valid[j]
  for j, i in zip(rest, into, strict=True):
    if i < m:
      members[i, j] = 1
  return plan, members, np.array(size, np.float32)


def values(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@hypothesis.given(assignments(), st.integers(0, 99))
def test_the_three_lowerings_are_the_matrix(made, seed):
  plan, members, size = made
  for p in (plan, plan.weighted(jnp.array(size))):
    x = values(seed, N, 2)
    expected = np.asarray(p.matrix()) @ np.asarray(x)
    for lowering in LOWERINGS:
      moved = p.apply(x, lowering=lowering)
      np.testing.assert_allclose(moved, expected, err_msg=lowering, **CLOSE)
  np.testing.assert_array_equal(plan.matrix(), members)


@hypothesis.given(assignments())
def test_index_dropped_and_total_say_who_went_where(made):
  plan, members, size = made
  to = np.where(members.any(0), members.argmax(0), members.shape[0])
  np.testing.assert_array_equal(plan.index, to)
  np.testing.assert_array_equal(plan.dropped, ~members.any(0).astype(bool))
  np.testing.assert_allclose(plan.total(jnp.array(size)), members @ size)


@hypothesis.given(assignments())
def test_weighted_outputs_are_means_of_their_members(made):
  plan, members, size = made
  matrix = np.asarray(plan.weighted(jnp.array(size)).matrix())
  for j, row in enumerate(members):
    mass = row * size
    if mass.sum() > 0:
      np.testing.assert_allclose(matrix[j], mass / mass.sum(), **CLOSE)
    elif row.any():
      expected = np.zeros(N)
      expected[int(plan.anchor[j])] = 1
      np.testing.assert_allclose(matrix[j], expected, **CLOSE)
    else:
      assert not matrix[j].any()


@hypothesis.given(assignments(), st.integers(0, 99))
def test_restore_copies_to_members_and_inverts_means(made, seed):
  plan, members, _ = made
  y = values(seed, plan.num_outputs, 2)
  restored = plan.restore(y)
  np.testing.assert_allclose(restored, members.T @ np.asarray(y), **CLOSE)
  mean = plan.weighted(jnp.ones((N,)))
  there = members.any(1)
  np.testing.assert_allclose(
    mean.apply(restored)[there], np.asarray(y)[there], **CLOSE
  )


@hypothesis.given(
  assignments(m=6), assignments(n=6), st.booleans(), st.booleans()
)
def test_then_is_the_product_of_matrices(one, two, dense_first, dense_second):
  (first, _, size), (second, _, _) = one, two
  first = first.weighted(jnp.array(size))
  expected = np.asarray(second.matrix()) @ np.asarray(first.matrix())
  # Sizes compose as well, and so does giving back.
  shares = second.as_mixture().share @ first.as_mixture().share
  y = values(0, second.num_outputs, 2)
  back = first.restore(second.restore(y))
  whole = (first.as_mixture() if dense_first else first).then(
    second.as_mixture() if dense_second else second
  )
  assert isinstance(whole, Mixture) == (dense_first or dense_second)
  np.testing.assert_allclose(whole.matrix(), expected, **CLOSE)
  np.testing.assert_allclose(whole.as_mixture().share, shares, **CLOSE)
  np.testing.assert_allclose(whole.restore(y), back, **CLOSE)
  np.testing.assert_array_equal(whole.anchor, first.anchor[second.anchor])


def test_selections_compose_to_a_selection():
  first = Assignment.select(jnp.array([5, 2, 7, 0]), N)
  second = Assignment.select(jnp.array([3, 1]), 4)
  whole = first.then(second)
  assert whole.rest is None, "dropping twice stays one gather"
  np.testing.assert_array_equal(whole.anchor, [0, 2])


@st.composite
def forests(draw):
  """Parents: anchors point at themselves, others at an anchor or nowhere."""
  real = [draw(st.booleans()) for _ in range(N)]
  anchors = [j for j in range(N) if real[j] and draw(st.booleans())]
  parent = []
  for j in range(N):
    if j in anchors:
      parent.append(j)
    else:
      parent.append(draw(st.sampled_from([*anchors, N])))
  order = draw(st.permutations(range(N)))
  return (
    np.array(parent),
    np.array(real),
    np.array(order),
    sorted(anchors, key=lambda j: order[j]),
  )


@hypothesis.given(forests())
def test_from_parent_groups_by_anchor_in_the_given_order(forest):
  parent, real, order, anchors = forest
  m = 7
  hypothesis.assume(len(anchors) <= m)
  plan = Assignment.from_parent(
    jnp.array(parent),
    m,
    order=jnp.array(order),
    mask=jnp.array(real),
    exact=False,
  )
  expected = np.zeros((m, N))
  for j in range(N):
    if real[j] and parent[j] < N:
      expected[anchors.index(parent[j]), j] = 1
  np.testing.assert_array_equal(plan.matrix(), expected)
  np.testing.assert_array_equal(plan.valid, np.arange(m) < len(anchors))
  assert len(set(np.asarray(plan.anchor).tolist())) == m, "anchors are distinct"
  x = values(3, N, 2)
  for lowering in LOWERINGS:
    moved = plan.apply(x, lowering=lowering)
    np.testing.assert_allclose(moved, expected @ np.asarray(x), **CLOSE)


@hypothesis.given(forests())
def test_from_parent_is_the_same_when_few_join(forest):
  parent, real, order, anchors = forest
  m = 7
  joins = (parent != np.arange(N)) & (parent < N) & real
  hypothesis.assume(len(anchors) <= m and joins.sum() <= N - m)
  args = jnp.array(parent), m
  options = {"order": jnp.array(order), "mask": jnp.array(real)}
  small = Assignment.from_parent(*args, **options)
  large = Assignment.from_parent(*args, **options, exact=False)
  assert small.rest.shape == (N - m,)
  np.testing.assert_array_equal(small.matrix(), large.matrix())


def test_identity_and_pruned():
  x = values(1, N, 2)
  same = Assignment.identity(N)
  np.testing.assert_array_equal(same.apply(x), x)
  np.testing.assert_array_equal(same.matrix(), np.eye(N))
  merged = Assignment(
    jnp.array([3, 0]), jnp.array([1, 2]), jnp.array([0, 1]), num_sources=4
  )
  np.testing.assert_array_equal(
    merged.pruned().matrix(), [[0, 0, 0, 1], [1, 0, 0, 0]]
  )


def test_a_mixture_needs_no_partition():
  weight = jnp.array([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
  share = jnp.array([[1.0, 0.5, 0.0], [0.0, 0.5, 0.0]])
  plan = Mixture(weight, share, share.T, jnp.array([0, 2]))
  x = values(2, 3, 2)
  np.testing.assert_allclose(plan.apply(x), weight @ x, **CLOSE)
  np.testing.assert_allclose(plan.total(jnp.array([2.0, 4.0, 8.0])), [4, 2])
  np.testing.assert_array_equal(plan.dropped, [False, False, True])


def test_move_carries_everything():
  tokens = Tokens(
    x=jnp.array([[1.0], [2.0], [3.0], [4.0]]),
    size=jnp.array([1.0, 1.0, 2.0, 1.0]),
    position=jnp.array([[0.0, 0], [0, 1], [1, 0], [1, 1]]),
    kind=jnp.array([Kind.CLASS, Kind.PATCH, Kind.PATCH, Kind.PATCH], jnp.int32),
    mask=jnp.array([True, True, True, False]),
  )
  plan = Assignment(
    jnp.array([0, 2, 3]), jnp.array([1]), jnp.array([1]), num_sources=4
  ).weighted(tokens.size)
  moved = move(plan, tokens)
  np.testing.assert_allclose(moved.x[:2, 0], [1, 8 / 3], rtol=1e-6)
  np.testing.assert_array_equal(moved.size, [1, 3, 0])
  np.testing.assert_array_equal(moved.position, [[0, 0], [1, 0], [1, 1]])
  np.testing.assert_array_equal(moved.kind, [Kind.CLASS, 0, 0])
  np.testing.assert_array_equal(moved.mask, [True, True, False])
  invalid = dataclasses.replace(plan, valid=jnp.array([True, False, True]))
  np.testing.assert_array_equal(
    move(invalid, tokens).mask, [True, False, False]
  )


def test_bfloat16_stays_bfloat16_and_sums_in_float32_weights():
  plan = Assignment(
    jnp.array([0]), jnp.array([1, 2]), jnp.array([0, 0]), num_sources=3
  ).weighted(jnp.ones(3))
  for lowering in LOWERINGS:
    moved = plan.apply(jnp.ones((3, 4), jnp.bfloat16), lowering=lowering)
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_allclose(moved.astype(jnp.float32), 1.0, rtol=0.02)


def test_gradients_flow_to_members_and_not_to_the_dropped():
  plan = Assignment(
    jnp.array([1, 2]), jnp.array([0, 3]), jnp.array([0, 2]), num_sources=4
  ).weighted(jnp.ones(4))
  for lowering in LOWERINGS:
    apply = lambda x, how=lowering: plan.apply(x, lowering=how).sum()
    gradient = jax.grad(apply)(jnp.ones((4, 1)))[:, 0]
    np.testing.assert_allclose(gradient, [0.5, 0.5, 1.0, 0.0])


def test_what_does_not_fit_is_refused():
  plan = Assignment.select(jnp.array([0, 1]), 4)
  with pytest.raises(ValueError, match=r"leaves 2 tokens.*expects 4"):
    plan.then(plan)
  with pytest.raises(ValueError, match=r"moves 4 tokens.*given 3"):
    move(plan, Tokens.create(jnp.ones((3, 1))))


def test_an_unknown_lowering_is_refused():
  plan = Assignment.identity(2)
  # The suite's type checks refuse it first, with an error that names it too.
  with pytest.raises((ValueError, TypeError), match="lowering"):
    plan.apply(jnp.ones((2, 1)), lowering="magic")
