"""The warm-up of the number of tokens, alone and in the loop."""

import math

import pytest

from experiments import train
from experiments.training import config as config_lib
from experiments.training.config import Recipe, Warmup
from experiments.typed import ConfigError
from tests.experiments import tiny


def test_levels_follow_the_run():
  warmup = Warmup(start=0.1, stop=0.5, levels=6)
  levels = [warmup.level(step, 100) for step in range(100)]
  assert levels[:10] == [0] * 10
  assert levels[10:50] == [1] * 10 + [2] * 10 + [3] * 10 + [4] * 10
  assert levels[50:] == [5] * 50


def test_rates_lie_on_the_cosine_of_one_stage():
  warmup = Warmup(levels=6, stages=3)
  keeps = [warmup.keep(0.343, level) for level in range(6)]
  assert (keeps[0], keeps[-1]) == (1.0, 0.343)
  assert keeps == sorted(keeps, reverse=True)
  for level in range(1, 5):
    cosine = (1 + math.cos(math.pi * (level - 0.5) / 4)) / 2
    rate = 0.7 + 0.3 * cosine
    assert keeps[level] == pytest.approx(rate**3, abs=1e-5)


def test_slots_keep_all_at_first_and_the_recipes_own_at_last():
  recipe = Recipe("evit", keep=0.343, warmup=Warmup())
  counts = [recipe.slots(level).counts(64, 4)[0] for level in range(5)]
  assert counts[0] == (None,) * 4
  assert counts[-1] == recipe.slots().counts(64, 4)[0]
  left = [min(c for c in count if c) for count in counts[1:]]
  assert left == sorted(left, reverse=True)
  assert Recipe("evit").level(3, 10) is None


@pytest.mark.parametrize(
  "warmup", [dict(start=0.5, stop=0.2), dict(levels=2), dict(stages=0)]
)
def test_what_cannot_be_is_refused(warmup):
  given = tiny.config(recipe=dict(name="evit", keep=0.5, warmup=warmup))
  with pytest.raises(ConfigError, match="recipe.warmup.*must"):
    config_lib.load(given)


def test_a_warmup_has_to_know_where_it_ends():
  given = tiny.config(recipe=dict(name="evit", warmup=dict()))
  with pytest.raises(ConfigError, match="keep"):
    config_lib.load(given)


def warming(steps: int):
  model = {**tiny.config()["model"], "patch_size": 2, "depth": 2}
  recipe = dict(
    name="evit",
    keep=0.3,
    warmup=dict(start=0.25, stop=0.75, levels=4, stages=1),
  )
  task = dict(name="classification")
  return tiny.config(model=model, recipe=recipe, steps=steps, task=task)


def test_a_resumed_warmup_is_bitwise_the_same(tmp_path, monkeypatch):
  whole = train.main(warming(8), tmp_path / "whole")
  flops = [
    row["gflops_per_step"] for row in tiny.rows(tmp_path / "whole").values()
  ]
  assert len(set(flops)) == 4, "one program a level"
  # So small a model pays more for the first selection than it saves.
  reducing = [f for f in flops if f != flops[0]]
  assert reducing == sorted(reducing, reverse=True)

  # Stopped between two levels, as SIGTERM would.
  reached = train.Preemption.reached
  monkeypatch.setattr(
    train.Preemption,
    "reached",
    lambda self, step: step == 3 or reached(self, step),
  )
  assert not train.main(warming(8), tmp_path / "cut").finished
  monkeypatch.undo()
  again = train.main(warming(8), tmp_path / "cut")
  assert again.finished
  tiny.assert_same(again.state.params, whole.state.params)
  assert tiny.losses(tmp_path / "cut") == tiny.losses(tmp_path / "whole")
