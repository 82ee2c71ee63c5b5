"""What a config can ask of the loop."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train, typed
from experiments.data import pipeline
from experiments.training import config as config_lib
from experiments.training import optim, trees
from experiments.training import state as state_lib
from tests.experiments import tiny
from tokjax import losses, recipes
from tokjax.slots import Slots

PLAIN = dict(name="classification")


def one_step(teacher=None, teacher_params=None, module=None, **changes):
  """State before and after one step, and metrics; a model without blocks."""
  config = config_lib.load(tiny.light(**changes))
  model = module or config.build_model()
  optimizer = optim.build(config.optimizer, config.steps)
  arrays = pipeline.heldout_arrays(config.data, config.batch_size)
  before = jax.jit(
    lambda: state_lib.init(config, model, arrays["image"][:1], optimizer)
  )()
  step = jax.jit(state_lib.make_step(config, model, optimizer, teacher))
  after, metrics = step(
    before, jax.tree.map(jnp.asarray, arrays), teacher_params
  )
  return before, after, jax.tree.map(float, metrics)


def test_accumulation_gives_the_same_step():
  rules = dict(name="sgd", lr=0.1, clip=None)
  _, whole, metrics = one_step(optimizer=rules, task=PLAIN)
  _, parts, same = one_step(optimizer={**rules, "accumulate": 4}, task=PLAIN)
  assert metrics == pytest.approx(same, rel=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    whole.params, parts.params,
  )  # fmt: skip


def test_batch_must_divide_into_parts():
  with pytest.raises(
    typed.ConfigError, match="batch_size=16: must be a multiple"
  ):
    config_lib.load(tiny.config(optimizer=dict(accumulate=3)))


def test_bf16_computes_in_bf16_and_keeps_float32():
  _, after, metrics = one_step(precision="bfloat16", task=PLAIN)
  _, _, exact = one_step(task=PLAIN)
  for leaf in jax.tree.leaves((after.params, after.ema)):
    assert leaf.dtype == jnp.float32
  assert metrics["loss"] == pytest.approx(exact["loss"], rel=0.02)
  assert metrics["loss"] != exact["loss"]


def test_ema_follows():
  before, after, _ = one_step(optimizer=dict(name="sgd", lr=1.0, ema=0.99))
  # The first average forgets nine tenths of the start.
  expected = jax.tree.map(
    lambda a, b: 0.1 * a + 0.9 * b, before.ema, after.params
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    after.ema,
    expected,
  )


def test_freezing_by_pattern():
  rules = dict(lr=0.1, freeze=(r"^encoder/", "position"), weight_decay=0.1)
  model = tiny.config()["model"]
  before, after, _ = one_step(optimizer=rules, model=model)
  old, new = trees.named(before.params), trees.named(after.params)
  for name, value in old.items():
    held = name.startswith("encoder/") or "position" in name
    assert np.array_equal(value, new[name]) == held, name
  moments = [n for n in trees.named(after.opt_state) if "encoder" in n]
  assert not moments, "frozen parameters need no moments"


def test_freezing_nothing_is_an_error():
  with pytest.raises(ValueError, match="'encoderr' matches no parameter"):
    one_step(optimizer=dict(freeze=("encoderr",)))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_schedules_and_rules(name, schedule):
  rules = optim.Optimizer(name=name, schedule=schedule, lr=0.5, warmup=10)
  rate = optim.learning_rate(rules, 110)
  assert rate(0) == 0 and rate(10) == pytest.approx(0.5)
  assert rate(5) == pytest.approx(0.25)
  assert float(rate(110)) == pytest.approx(
    0.5 * (schedule == "constant"), abs=1e-6
  )
  params = {"a": {"kernel": jnp.ones((2, 2))}}
  optimizer = optim.build(rules, 110)
  updates, _ = optimizer.update(params, optimizer.init(params), params)
  assert jnp.isfinite(updates["a"]["kernel"]).all()


def test_mixup_mixes_neighbours():
  task = config_lib.load(tiny.config()).task
  batch = {"image": jnp.arange(4.0)[:, None], "label": jnp.arange(4)}
  data = config_lib.load(tiny.config()).data
  mixed = task.prepare(batch, data, jax.random.key(1))
  share = (mixed["image"][0, 0] - 1) / (0 - 1)
  assert 0 <= share <= 1
  expected = jnp.array([1 - share, share, 3 - share, 2 + share])
  np.testing.assert_allclose(mixed["image"][:, 0], expected, rtol=1e-5)
  np.testing.assert_allclose(mixed["label"].sum(-1), 1.0, rtol=1e-5)
  smooth = 0.9 * share + 0.01
  np.testing.assert_allclose(mixed["label"][0, 0], smooth, rtol=1e-4)


@dataclasses.dataclass(frozen=True)
class Constant:
  value: float
  weight: float = 1.0
  name = "constant"

  def __call__(self, view):
    assert view.logits.shape == view.target.shape
    return jnp.asarray(self.value)


def test_losses_of_recipes_are_added():
  config = config_lib.load(tiny.light())
  module = config.build_model(Slots(losses=(Constant(3.0, 0.5),)))
  _, _, plain = one_step(task=PLAIN)
  _, _, more = one_step(task=PLAIN, module=module)
  assert more["constant"] == 3.0
  assert more["loss"] == pytest.approx(plain["loss"] + 1.5, rel=1e-5)


def test_losses_of_the_config():
  auxiliary = (dict(name="consistency", weight=2.0),)
  changes = dict(
    model=tiny.config()["model"],
    recipe=dict(name="stride", keep=0.5),
    task=dict(name="classification", auxiliary=auxiliary),
  )
  _, _, metrics = one_step(**changes)
  assert metrics["consistency"] > 0
  config = config_lib.load(tiny.config(**changes))
  assert config.task.auxiliary == (losses.Consistency(weight=2.0),)
  assert config_lib.load(json.loads(json.dumps(config.to_dict()))) == config


def test_two_losses_of_one_name():
  config = config_lib.load(tiny.light())
  module = config.build_model(Slots(losses=(Constant(1.0), Constant(2.0))))
  with pytest.raises(ValueError, match="two auxiliary losses"):
    one_step(module=module)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("teacher")
  return train.main(tiny.light(steps=2), workdir), str(workdir)


def test_distillation_and_warm_start(teacher, tmp_path):
  run, workdir = teacher
  task = dict(name="classification", distill=1.0, temperature=2.0)
  config = tiny.light(steps=1, task=task, teacher=workdir, init=workdir)
  student = train.main(config, tmp_path)
  row = tiny.rows(tmp_path)[1]
  # The student starts as its own teacher.
  assert row["distill"] == pytest.approx(0.0, abs=1e-6)
  assert row["loss"] == pytest.approx(0.0, abs=1e-6)
  assert student.params["head"].keys() == run.params["head"].keys()


def test_divergence_is_not_saved(tmp_path):
  config = tiny.light(optimizer=dict(name="sgd", lr=1e30, clip=None))
  with pytest.raises(FloatingPointError, match="not saved"):
    train.main(config, tmp_path)


def test_a_state_that_diverged_is_not_saved(tmp_path):
  """Its loss is that of before the step, and finite."""
  rules = dict(name="sgd", lr=1e30, weight_decay=1e30, clip=None)
  config = tiny.light(steps=1, optimizer=rules, log_every=9)
  message = "step 1: the state has diverged"
  with pytest.raises(FloatingPointError, match=message):
    train.main(config, tmp_path)
  assert not list((tmp_path / "checkpoints").iterdir())


def test_held_out_loss_that_is_not_finite_is_an_error(tmp_path, monkeypatch):
  task = config_lib.load(tiny.light()).task
  bad = lambda *_: {"loss": math.nan}
  monkeypatch.setattr(type(task), "evaluate", bad)
  with pytest.raises(FloatingPointError, match="held-out loss is nan"):
    train.main(tiny.light(steps=2), tmp_path)


def test_profile_writes_a_trace(tmp_path):
  train.main(tiny.light(steps=3), tmp_path, profile="2:3")
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  with pytest.raises(ValueError, match="must be FIRST:LAST"):
    train.main(tiny.light(), tmp_path, profile="ten")


def test_rows_report_cost_and_speed(teacher):
  row = tiny.rows(pathlib.Path(teacher[1]))[2]
  for name in ("images_per_second", "wait", "gflops_per_step", "learning_rate"):
    assert row[name] >= 0
  assert row["peak_memory_mib"] > 0


def test_reduction_lowers_the_flops_of_the_step():
  flops = {}
  for name, keep in (("none", None), ("tome", 0.4)):
    assert name in recipes.names()
    config = config_lib.load(
      tiny.config(
        model=dict(
          name="vit",
          image_size=8,
          patch_size=1,
          channels=1,
          width=16,
          depth=2,
          heads=2,
          mlp_dim=64,
          num_classes=10,
        ),
        recipe=dict(name=name, keep=keep),
      )  # fmt: skip
    )
    model, optimizer = config.build_model(), optim.build(config.optimizer, 8)
    arrays = pipeline.heldout_arrays(config.data, 16)
    state = jax.eval_shape(
      lambda: state_lib.init(config, model, arrays["image"][:1], optimizer)  # noqa: B023
    )
    step = jax.jit(state_lib.make_step(config, model, optimizer))
    flops[name] = step.lower(state, arrays).cost_analysis()["flops"]
  assert flops["tome"] < 0.9 * flops["none"]


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(stepz=3), "config.stepz: unknown key; did you mean 'steps'"),
    (dict(optimizer=dict(lrr=1.0)), "config.optimizer.lrr: unknown key"),
    (dict(optimizer=dict(lr="1")), "config.optimizer.lr='1': must be float"),
    (dict(optimizer=dict(name="adam")), "must be one of"),
    (dict(steps=2.5), "config.steps=2.5: must be int"),
    (dict(steps=True), "config.steps=True: must be int"),
    (dict(data=dict(name="digit")), "config.data.name='digit': must be one of"),
    (dict(task=dict(name="classification", mixup=-1.0)), "mixup=-1.0"),
    (dict(model=dict(name="vit", patch_size=3)), "must be a multiple"),
    (dict(steps=0), "steps=0: must be 1 or more"),
    (dict(mesh=dict(data=0)), "mesh"),
    (dict(eval_batch_size=9), "eval_batch_size=9: must be a multiple"),
    (dict(batch_size=1440), "the data set has 1437 examples"),
    (dict(threads=0), "threads=0"),
    (dict(init=""), "init=''"),
    (dict(optimizer=dict(b2=1.5)), "b2=1.5: must be in [0, 1)"),
    (dict(optimizer=dict(lr=-1.0)), "lr=-1.0: must be positive"),
    (dict(optimizer=dict(lr=math.nan)), "lr=nan: must be a finite number"),
    (dict(optimizer=dict(weight_decay=-1.0)), "weight_decay=-1.0"),
    (dict(optimizer=dict(clip=0.0)), "clip=0.0: must be positive"),
    (dict(optimizer=dict(freeze=("(",))), "freeze='('"),
    (dict(recipe=dict(name="tome", keep=0.0)), "keep=0.0: must be in (0, 1]"),
    (dict(recipe=dict(name="tome", keep=math.nan)), "must be a finite number"),
    (dict(recipe=dict(name="tome", keep=1.0000001)), "must be in (0, 1]"),
    (dict(recipe=dict(name="tome", keep=True)), "keep=True: must be float"),
    (
      dict(recipe=dict(name="tome", options=dict(proportional="abc"))),
      "recipe 'tome': proportional='abc': must be bool",
    ),
  ],
)
def test_bad_configs_name_the_key(change, message, tmp_path):
  with pytest.raises(ValueError) as error:
    train.main(tiny.config(**change), tmp_path)
  assert message in str(error.value)
