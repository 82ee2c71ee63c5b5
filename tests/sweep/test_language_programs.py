"""Programs of the language sweep: what they share, and what they answer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.sweeps import asking, decoding, dense_prefill
from experiments.sweeps.decoding import Batch, Shape
from experiments.sweeps.language_models import LanguageModel, RecallAndText
from experiments.sweeps.lowered import Shapes, key_of
from experiments.sweeps.probe import OWN, Probe
from experiments.sweeps.subject import UNREDUCED, Job
from experiments.typed import ConfigError
from tests.decoder import models
from tokjax import budgets, recipes
from tokjax.models import Generator, generation

SHAPE = Shape(2, 12, 4)
PROMPTS = [[3, 9, 4, 9, 7, 1, 5, 9, 4, 2, 8, 6], [5, 6, 7, 8, 9, 1, 2]]
OPTIONS = {
  "snapkv": dict(window=2, kernel=3), "kivi": dict(group=4, residual=4)
}  # fmt: skip


def language_model():
  config = models.config(depth=2)
  return LanguageModel(
    config, models.params_of(config), jnp.float32, None, None, "here"
  )


@pytest.fixture(scope="module")
def shared():
  """The model, and its recorded prefill."""
  lm = language_model()
  return lm, decoding.Dense.of(lm, SHAPE)


def job_of(name, keep=0.5):
  return Job(name, keep, tuple(sorted(OPTIONS.get(name, {}).items())))


def batch_of(fed):
  probes = [Probe(p, fed, [-1] * len(fed), 12, 0.0, 1) for p in PROMPTS]
  return Batch.of(probes, SHAPE)


@pytest.mark.parametrize("name", ["snapkv", "h2o", "kivi"])
def test_a_shared_prefill_leaves_the_states_of_ones_own(shared, name):
  lm, dense = shared
  job, batch = job_of(name), batch_of([3])
  program = decoding.build(lm, job, SHAPE, dense)
  assert program.shared
  record = dense(lm.params, batch)
  state, _ = program.start(lm.params, batch, record)
  found = decoding.whole_of(state)
  own = generation.prefill(
    lm.build(job.slots()), lm.params, batch.tokens, batch.length, SHAPE.steps
  )
  assert jax.tree.structure(found) == jax.tree.structure(own)
  for a, b in zip(*map(jax.tree.leaves, (found, own)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_who_shares_the_dense_prefill():
  """Caches that compress it; none that attends, reduces or learns."""
  names = recipes.names("cache") + recipes.names("llm")
  found = {n for n in names if dense_prefill.shares(recipes.get(n))}
  assert found == {
    "full", "random_kv", "snapkv", "pyramidkv", "adakv", "h2o", "knorm",
    "expected_attention", "razor_attention", "kivi", "zipcache", "quest",
    "tidaldecode", "vidkv", "delta",
  }  # fmt: skip


def test_the_model_goes_on_by_itself(shared):
  """What is fed as `OWN` is greedy generation, for as long as asked."""
  lm, dense = shared
  program = decoding.build(lm, UNREDUCED, SHAPE, dense)
  model = lm.build(UNREDUCED.slots())
  generator = Generator(model, lm.params, capacity=12, decode=8)
  texts = [[*prompt, 3] for prompt in PROMPTS[1:]]
  expected = np.array(generator.generate(texts, most=3))
  batch = batch_of([3, OWN, OWN])
  record = dense(lm.params, batch)
  state, _ = program.start(lm.params, batch, record)
  answers, _ = program.answer(lm.params, state, batch)
  np.testing.assert_array_equal(answers.token[1:, :3], expected)
  assert (answers.token[:, 3] == 0).all()  # `count` steps and no more


def test_recipes_that_compute_the_same_are_known(shared):
  """A budget that no prompt reaches leaves the full cache's programs."""
  lm, dense = shared
  identity = lambda job: decoding.build(lm, job, SHAPE, dense).identity
  assert identity(UNREDUCED) == identity(Job("full", None))
  assert identity(UNREDUCED) != identity(job_of("snapkv"))


def test_options_of_a_sweep_become_what_the_recipe_states():
  """A number of tokens is a budget, as in training."""
  slots = Job("quest", None, (("budget", 64), ("page", 8))).slots()
  assert slots.cache.read.budget == budgets.Count(64)
  with pytest.raises(ConfigError, match="budget='many'.*number of tokens"):
    Job("quest", None, (("budget", "many"),)).slots()


def test_equal_programs_have_one_key():
  x = Shapes.of(jnp.zeros(3))
  one, _ = key_of(lambda x: {"a": x + 1}, x)
  same, out = key_of(lambda y: (y + 1,), x)
  other, _ = key_of(lambda x: {"a": x + 2}, x)
  assert one == same != other
  assert [leaf.shape for leaf in out.leaves] == [(3,)]


def test_short_prompts_do_not_cost_what_the_longest_do():
  lm = language_model()
  pair = RecallAndText(lm, lm, [], np.zeros((0, 4)), "here")
  ask = lambda n, steps: Probe([1] * n, [1] * steps, [2] * steps, n, 0.0, 1)
  questions = [ask(n, s) for n, s in ((500, 3), (64, 9), (512, 5), (60, 2))]
  groups = asking.groups_of(pair, questions, [], 4, 700, ())
  assert [(g.shape, g.batches) for g in groups] == [
    (Shape(1, 512, 5), (((2,),), ((0,),))),
    (Shape(2, 64, 9), (((1,), (3,)),)),
  ]
  (one,) = asking.groups_of(pair, questions, [], 4, 9999, (600,))
  assert one.shape == Shape(4, 600, 9)
  for n in (1, 9, 100, 1024, 1025, 5000):
    assert n <= asking.bucket(n, ()) <= max(9 * n / 8, n + asking.LEAST)


def test_questions_about_one_prompt_are_asked_of_one_state(shared):
  """As if each had a prompt of its own; rows may have fewer questions."""
  lm, dense = shared
  model = lm.build(UNREDUCED.slots())
  generator = Generator(model, lm.params, capacity=13, decode=4)
  fed = [(0, 3), (1, 4), (0, 6), (0, 7)]
  texts = [[*PROMPTS[row], token] for row, token in fed]
  said = np.array(generator.generate(texts, most=1))[:, 0]
  # One is wrong.
  asked = [
    Probe(PROMPTS[row], [token], [int(own) + (token == 6)], 12, 0.0, 1)
    for (row, token), own in zip(fed, said, strict=True)
  ]

  def answers(grouped):
    pair = RecallAndText(lm, lm, asked, np.zeros((0, 4)), "here")
    groups = asking.groups_of(pair, asked, [], 2, 99, (12,))
    (group,) = groups
    if not grouped:
      shape = group.shape._replace(batch=1)
      alone = tuple(((number,),) for number in range(len(asked)))
      group = dataclasses.replace(group, shape=shape, batches=alone)
    dense = {group: decoding.Dense.of(lm, group.shape)}
    made = asking.Programs(
      UNREDUCED,
      {group: decoding.build(lm, UNREDUCED, group.shape, dense[group])},
    )
    ask = asking.Asker(
      pair, asked, [], [group], dense, dense_prefill.Kept(2**20), 1
    )
    told = []
    (found,) = ask([made], made, lambda *count: told.append(count))
    return found.right, told

  right, told = answers(grouped=True)
  # One prefill, and another one that is timed.
  assert told == [(1, 2), (2, 2)]
  alone, told = answers(grouped=False)
  assert told[-1] == (4, 4)
  np.testing.assert_array_equal(right, alone)
  np.testing.assert_array_equal(right, [[1, 1, 0, 1]])


def test_the_longest_prompts_are_timed_but_not_those_that_compile():
  def turns(batches, rounds, seed=0):
    groups = [
      asking.Group("text", Shape(1, size, 1), tuple(((i,),) for i in range(n)))
      for size, n in batches.items()
    ]
    made = asking.Asker(None, [], [], groups, {}, None, rounds)
    return [
      (t.group.shape.prompt, t.rows[0][0], t.timed, t.again)
      for t in made._turns(seed)
    ]

  new = lambda *turn: (*turn, False)
  assert turns({64: 3, 32: 2}, 2) == [
    new(64, 0, False), new(64, 1, True), new(64, 2, True), new(32, 0, False),
    new(32, 1, False),
  ]  # fmt: skip
  # One batch of the longest prompts is run again; there are two others.
  assert turns({64: 1, 32: 2}, 3) == [
    new(64, 0, False), new(32, 0, False), new(32, 1, True),
    (64, 0, True, True), (64, 0, True, True),
  ]  # fmt: skip
  assert not any(t[2] for t in turns({64: 3}, 2, seed=1))
  assert turns({}, 2) == []


def test_records_are_kept_as_far_as_there_is_room():
  kept, made = dense_prefill.Kept(20), []

  def make(name):
    made.append(name)
    return [jnp.zeros(3)]  # 12 bytes

  for name in "abab":
    kept.get(name, lambda name=name: make(name))
  assert made == ["a", "b", "b"]


def test_a_recording_is_no_cache(shared):
  lm, dense = shared
  states = dataclasses.astuple(dense_prefill.RECORDING.cache)
  assert states == (("token",),)
  with pytest.raises(NotImplementedError):
    dense_prefill.RECORDING.cache.bytes(None, None)
