"""Settings on the command line: all can be set, all are listed, none traced."""

import pathlib
import sys
import typing

import pytest

from configs import digits, digits_pareto, generate, kv_pareto
from configs.bench import block_sparse
from experiments import benchmark, evaluate, launch, settings, sweep, typed
from experiments import generate as generate_lib
from experiments.command import Command, Option, UsageError
from experiments.training import config as config_lib
from tokjax.budgets import Count, Share, Sum

ROOT = pathlib.Path(__file__).resolve().parents[2]
KINDS = (
  config_lib.Config,
  *sweep.KINDS,
  generate_lib.Generate,
  benchmark.Benchmark,
  evaluate.Evaluation,
)
LOADED = {
  "digits": (digits, config_lib.load),
  "digits_pareto": (digits_pareto, sweep.load),
  "kv_pareto": (kv_pareto, sweep.load),
  "generate": (generate, generate_lib.load),
  "block_sparse": (block_sparse, benchmark.load),
}
TRAIN = Command(
  "trains", (launch.workdir(), Option("keep", float, None, "."),
  Option("yes", bool, False, "."), Option("stop", str, None, ".", many=True)),
  (config_lib.Config,),
)  # fmt: skip
DIGITS = f"--config={ROOT / 'configs' / 'digits.py'}"


def parse(*words, base=(DIGITS, "--workdir=w")):
  return TRAIN.parse([*base, *words])


@pytest.mark.parametrize("name", LOADED)
def test_every_field_can_be_set(name):
  """Each to the value that it has, the file's or a default."""
  module, load = LOADED[name]
  config = module.get_config()
  before = load(config)
  found = list(plain(before, typed.to_dict(before)))
  assert len(found) >= 15
  for path, value in found:
    settings.assign(config, lambda _: type(before), [(path, text_of(value))])
  assert load(config) == before


def plain(made, values, prefix=""):
  """Paths and values of a written config, with the names of its choices."""
  names = {v: k for table in tables(type(made)) for k, v in table.items()}
  for key, value in values.items():
    inner = getattr(made, key, None)
    if isinstance(value, dict) and hasattr(inner, "__dataclass_fields__"):
      if "name" not in value and type(inner) in names:
        yield f"{prefix}{key}.name", names[type(inner)]
      yield from plain(inner, value, f"{prefix}{key}.")
    elif isinstance(value, dict) and value:
      yield from plain(None, value, f"{prefix}{key}.")
    elif not isinstance(value, Share):  # An object of a config file.
      yield f"{prefix}{key}", value


def tables(cls):
  hints = typing.get_type_hints(cls, include_extras=True).values()
  return [t for t, _ in map(typed.parts, hints) if t is not None]


def text_of(value):
  return repr(value) if isinstance(value, list | dict) else str(value)


def test_values_are_read_by_type():
  given = parse(
    "--config.optimizer.lr=1", "--config.optimizer.freeze=^a/,b",
    "--config.model.image_size=(8,16)", "--config.init=None",
    "--config.recipe.options.r=3", "--config.precision", "bfloat16",
    "--config.recipe.warmup.levels=4", "--config.model.registers=2",
    "--config.recipe.budget.keep=0.5", "--config.recipe.budget.name=once",
    "--config.recipe.keep=0.5",
  )  # fmt: skip
  made = config_lib.load(given.config)
  assert made.optimizer.lr == 1.0 and made.optimizer.freeze == ("^a/", "b")
  assert made.model.image_size == (8, 16) and made.init is None
  assert made.recipe.options == (("r", 3),) and made.precision == "bfloat16"
  assert made.recipe.warmup.levels == 4 and made.model.registers == 2
  assert made.recipe.budget.keep == 0.5


@pytest.mark.parametrize(
  "text, budget", [("64", Count(64)), ("0.25", Share(0.25))]
)
def test_a_budget_is_a_number_of_tokens_or_a_fraction(text, budget):
  given = parse("--config.recipe.name=h2o", "--config.recipe.options.heavy=8",
                f"--config.recipe.options.recent={text}")  # fmt: skip
  cache = config_lib.load(given.config).recipe.slots().cache
  assert cache.evict.budget == Sum(Count(8), budget)


@pytest.mark.parametrize(
  "text, message",
  [("many", "a number of tokens or a fraction"), ("1.5", "must lie in")],
)
def test_what_is_no_budget_is_refused(text, message):
  given = parse("--config.recipe.name=h2o", "--config.recipe.options.heavy=8",
                f"--config.recipe.options.recent={text}")  # fmt: skip
  with pytest.raises(typed.ConfigError, match=f"'h2o': recent.*{message}"):
    config_lib.load(given.config).recipe.slots()


def test_another_choice_starts_its_entry_anew():
  given = parse("--config.data.side=4", "--config.data.name=digit_grid")
  assert config_lib.load(given.config).data.side == 4


def test_references_between_entries_are_kept(tmp_path):
  (tmp_path / "c.py").write_text(
    "from configs import digits\n"
    "def get_config():\n"
    "  config = digits.get_config()\n"
    "  config.eval_every = config.get_ref('steps')\n"
    "  return config\n"
  )
  base = (f"--config={tmp_path / 'c.py'}", "--workdir=w")
  given = parse("--config.steps=7", base=base)
  assert given.config.eval_every == 7


def test_options_of_a_command():
  given = parse("--yes", "--stop", "a", "--stop=b", "--keep=0.5")
  assert given.yes and given.stop == ["a", "b"] and given.keep == 0.5
  assert not parse("--yes=false").yes


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__qualname__)
def test_every_setting_is_listed_with_its_meaning(kind):
  shown = settings.listing([kind], None)
  lines = shown.splitlines()
  assert max(map(len, lines)) <= settings.WIDTH
  for i, line in enumerate(lines):
    setting = line.startswith("  --config") and ":" not in line
    if setting and not line.split()[0].endswith(".name"):
      meant = any(x.startswith(" " * 6) for x in lines[i + 1 : i + 3])
      assert meant, f"{line}: add its meaning to `Attributes` of the docstring"


def test_help_shows_the_values_of_the_file():
  shown = TRAIN.help([DIGITS, "--config.steps=77"])
  assert "--config.steps  int (77)" in shown
  assert "--config.optimizer.lr  float (0.002)" in shown
  assert "--config.optimizer.clip  float | None (1.0)" in shown
  assert "--config.data.shift" in shown and "digit_grid:" not in shown
  assert "--workdir  str (required)" in shown


@pytest.mark.parametrize(
  "words, message",
  [
    (["--config.optimizer.lrr=1"], "lrr: unknown key; did you mean 'lr'"),
    (["--config.stepz=1"], "config.stepz: unknown key; did you mean 'steps'"),
    (["--config.optimizer.lr=abc"], "optimizer.lr='abc': must be float"),
    (["--config.steps=2.5"], "config.steps='2.5': must be int"),
    (["--config.steps"], "--config.steps: needs a value"),
    (["--config.steps.x=1"], "config.steps has no entries"),
    (["--config.data.name=digit"], "must be one of"),
    (["--config.model=vit"], "set alone, as --config.model.name=NAME"),
    (["--config.precision=bfloat61"], "did you mean 'bfloat16'"),
    (["--config.recipe.budget.keep=1"], "config.recipe.budget.name=None"),
    (["--config.model.class_token=maybe"], "must be bool"),
    (["--wordkir=w"], "unknown option --wordkir; did you mean '--workdir'"),
    (["--steps=3"], "did you mean '--config.steps'"),
    (["--optimizer.lr=3"], "did you mean '--config.optimizer.lr'"),
    (["more"], "unexpected argument 'more'"),
    (["--keep=much"], "--keep: invalid float value: 'much'"),
    (["--yes=perhaps"], "must be true or false"),
  ],
)  # fmt: skip
def test_wrong_words(words, message):
  with pytest.raises((UsageError, typed.ConfigError)) as error:
    parse(*words)
  assert message in str(error.value)


def test_what_is_missing():
  with pytest.raises(UsageError, match="--workdir: is required"):
    parse(base=(DIGITS,))
  with pytest.raises(UsageError, match="--config: is required"):
    parse(base=("--workdir=w",))
  with pytest.raises(OSError, match="did you mean 'configs/digits.py'"):
    parse(base=("--config=configs/dgits.py", "--workdir=w"))


@pytest.mark.parametrize(
  "text, message",
  [
    ("def get_config(:", "SyntaxError"),
    ("x = 1", "has no function get_config()"),
    ("import nothing_of_this_name", "line 1: ModuleNotFoundError"),
    ("def get_config():\n  return 1 / 0", "line 2: ZeroDivisionError"),
    ("def get_config():\n  return 3", "returned a int"),
    ("def get_config():\n  raise ValueError('keep=2: no')", "keep=2: no"),
  ],
)
def test_config_files_that_fail(text, message, tmp_path):
  (tmp_path / "c.py").write_text(text)
  with pytest.raises(typed.ConfigError) as error:
    parse(base=(f"--config={tmp_path / 'c.py'}", "--workdir=w"))
  assert message in str(error.value) and "\n" not in str(error.value)


def test_an_error_is_one_line(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["train", DIGITS, "--workdir="])
  with pytest.raises(SystemExit) as end:
    launch.start(TRAIN, lambda given: None)
  assert end.value.code == "error: workdir='': must name a directory"
  monkeypatch.setattr(sys, "argv", ["train", DIGITS, "--workdir=w"])

  def main(given):
    raise ValueError("one\n  two")

  with pytest.raises(SystemExit) as end:
    launch.start(TRAIN, main)
  assert end.value.code == "error: one two"
