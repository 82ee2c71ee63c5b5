"""Trained methods against untrained ones and random selection, on digits.

python -m experiments.sweeps.learned_table --workdir DIR

Trains every method of `configs/learned` with three seeds from one trained
backbone and compares, on the held-out images and at the same counts: the
trained method; the backbone with the untrained method; random selection; for
some, training without the method's own part. Nothing is
downloaded. Interrupted, it goes on where it was. Writes `rows.json` and
`table.md` into the workdir.

No `Subject` of `experiments.sweep`: a row is a training run of its own, with
neither a keep ratio nor a time.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from configs.learned import base
from experiments.data import pipeline
from experiments.evaluate import load_run
from experiments.sweeps import learned_report, report, runs
from experiments.sweeps.corruptions import CORRUPTIONS
from experiments.sweeps.results import Row, writable
from experiments.training import config as config_lib
from experiments.training import mesh as mesh_lib
from experiments.training import rundir
from experiments.training import state as state_lib
from tokjax.analysis import cost
from tokjax.attention import dense
from tokjax.learned import sparse_mask
from tokjax.recipes.vision import baselines
from tokjax.slots import Slots


@dataclasses.dataclass(frozen=True)
class Method:
  """What is trained and what it is compared with.

  Attributes:
    name: of `configs/learned/<name>.py`.
    module: also train with the parameters of this name frozen; None: no.
    chance: "drop": random tokens at the same counts and places; "mask": random
      keys of the same number; None: there is nothing to select.
    phases: values of the config's `phase`, each starting from the one before.
    corrupt: accuracy on corrupted images too, against the plain model trained
      as long.
  """

  name: str
  module: str | None = None
  chance: str | None = "drop"
  phases: tuple[str, ...] = ()
  corrupt: bool = False


METHODS = (
  Method("dynamicvit"),
  Method("evit"),
  Method("token_learner"),
  Method("mctf"),
  Method("sparsifiner", chance="mask", phases=("predict", "sparse")),
  Method("pyra", module="learned"),
  Method("tap_adl", chance=None, corrupt=True),
)


@dataclasses.dataclass(frozen=True)
class RandomMask:
  """Attention over random keys, others for each image, head and query.

  The class token sees all, as in Sparsifiner.
  """

  share: float
  seed: int

  def __call__(self, q, k, v, *, bias=None, mask=None):
    b, h, n, _ = q.shape
    noise = jax.random.uniform(jax.random.key(self.seed), (b, h, n - 1, n))
    seen = sparse_mask.largest(noise, sparse_mask.room(self.share, n))
    seen = jnp.concatenate([jnp.ones((b, h, 1, n), bool), seen], axis=2)
    weight = dense.probabilities(q, k, bias=bias, mask=mask, seen=seen)
    return dense.mix(weight, v)


def by_chance(slots: Slots, kind: str, seed: int) -> Slots:
  """Slots with the counts of `slots` that keep random tokens or keys."""
  if kind == "mask":
    return Slots(attend=RandomMask(slots.attend.keep, seed), name="random")
  places = ("input", "mlp")
  reduce = tuple(
    dataclasses.replace(
      r,
      rule=baselines.drop_random,
      at=r.at if r.at in places else "input",
      soft=None,
      learned=None,
      combine=None,
    )
    for r in slots.reduce
  )
  return Slots(reduce, name="random")


@dataclasses.dataclass(frozen=True)
class Bench:
  """Where runs are kept, and how long training takes.

  Attributes:
    workdir: of the table.
    local: two steps everywhere, for tests.
  """

  workdir: pathlib.Path
  local: bool = False

  def config(self, name: str, **arguments: str) -> ml_collections.ConfigDict:
    """The config file with arguments."""
    module = importlib.import_module(f"configs.{name}")
    parts = [f"{k}={v}" for k, v in arguments.items() if v]
    return module.get_config(",".join(parts + ["runlocal"] * self.local))

  def run(self, config: ml_collections.ConfigDict, folder: str) -> Any:
    """Parameters of a run, trained unless they are there."""
    path = self.workdir / folder
    done = path / "done"
    if not done.exists():
      runs.trained(config, path)
      done.touch()
    return load_run(path, mesh_lib.Mesh().build())[1]

  def backbone(self) -> str:
    """Folder of the trained plain model that methods start from."""
    self.run(self.config("learned.backbone"), "backbone")
    return "backbone"

  def path(self, folder: str) -> str:
    return str(self.workdir / folder)


def trained(
  bench: Bench, method: Method, seed: int, changes: dict[str, Any], suffix: str
) -> tuple[config_lib.Config, Any]:
  """Config and parameters of a method after its last phase.

  Args:
    changes: of the config; a run with changes has the last phase only.
    suffix: of the folder of such a run.
  """
  backbone = start = bench.backbone()
  phases = method.phases or ("",)
  for phase in phases[-1:] if changes else phases:
    arguments = {"backbone": bench.path(start), "phase": phase}
    if phase and phase == phases[-1]:
      arguments["teacher"] = bench.path(backbone)
    config = bench.config(f"learned.{method.name}", **arguments)
    config.seed = seed
    config.update_from_flattened_dict(changes)
    start = "-".join(filter(None, (method.name, phase, suffix, str(seed))))
    params = bench.run(config, start)
  return config_lib.load(config), params


def plain(bench: Bench, seed: int) -> Any:
  """Parameters of the backbone trained as long as a method."""
  values = base.parse_arg("runlocal" if bench.local else "")
  values.backbone = bench.path(bench.backbone())
  config = base.start(values)
  config.seed = seed
  return bench.run(config, f"plain-{seed}")


def with_fresh(config: config_lib.Config, slots: Slots, params: Any, seed: int):
  """The parameters, and random ones for what only the slots have."""
  config = dataclasses.replace(config, seed=seed)
  model = config.build_model(slots)
  example = pipeline.heldout_arrays(config.data, 1)["image"]

  def init(params):
    return state_lib.init(
      config, model, example, optax.identity(), params
    ).params

  return jax.jit(init)(params)


def accuracy(
  config: config_lib.Config,
  slots: Slots,
  params: Any,
  corrupt: str | None = None,
) -> float:
  """On the held-out images, in percent."""
  model = config.build_model(slots)

  def batches():
    held = pipeline.heldout_batches(config.data, config.eval_batch_size, 1)
    for i, batch in enumerate(held):
      if corrupt is not None:
        key = jax.random.key(i)
        batch["image"] = CORRUPTIONS[corrupt](jnp.asarray(batch["image"]), key)
      yield batch

  return 100 * config.task.evaluate(model, params, batches())["accuracy"]


def plainest(config: config_lib.Config) -> config_lib.Config:
  """A config of the same model, data and task, with defaults otherwise."""
  return config_lib.Config(config.model, config.data, config.task)


@functools.cache
def gflops(config: config_lib.Config, slots: Slots) -> float:
  """Of one image, by the compiler; selection included."""
  model = config.build_model(slots)
  images = jnp.asarray(pipeline.heldout_arrays(config.data, 1)["image"])
  key = jax.random.key(0)
  params = jax.eval_shape(lambda: model.init(key, images, key=key)["params"])
  forward = lambda p, x: model.apply({"params": p}, x, key=key)[0]
  return cost.measure(forward, params, images).flops / 1e9


def measure(bench: Bench, method: Method, seed: int) -> Iterator[Row]:
  """Rows of one method and seed: selection, accuracy, cost."""
  config, params = trained(bench, method, seed, {}, "")
  slots = config.recipe.slots()
  start = load_run(bench.workdir / bench.backbone(), mesh_lib.Mesh().build())
  cases = {"trained": (slots, params)}
  if method.module:
    frozen = (*config.optimizer.freeze, method.module)
    changes = {"optimizer.freeze": frozen}
    _, other = trained(bench, method, seed, changes, "module_frozen")
    cases["module frozen"] = (slots, other)
  cases["untrained"] = (slots, with_fresh(config, slots, start[1], seed))
  if method.chance:
    cases["random"] = (by_chance(slots, method.chance, seed), start[1])
  cases["unreduced"] = (Slots(), start[1])
  if method.corrupt:
    cases["plain, trained"] = (Slots(), plain(bench, seed))
  for selection, (slots, params) in cases.items():
    row = {"method": method.name, "selection": selection, "seed": seed}
    row["accuracy"] = accuracy(config, slots, params)
    row["gflops"] = gflops(plainest(config), slots)
    for kind in CORRUPTIONS if method.corrupt else ():
      row[kind] = accuracy(config, slots, params, kind)
    yield row


def main(
  workdir: str | pathlib.Path,
  methods: tuple[str, ...] = (),
  seeds: int = 3,
  local: bool = False,
) -> list[Row]:
  """All rows; those of finished methods and seeds are not made again.

  Args:
    workdir: everything is written under it.
    methods: names of `METHODS`; empty: all.
    seeds: how often each method is trained.
    local: two steps everywhere, for tests.

  Raises:
    ValueError: an unknown method, no seed, or a workdir that cannot be
      written to.
  """
  known = {method.name for method in METHODS}
  if unknown := set(methods) - known:
    raise ValueError(
      f"methods={sorted(unknown)}: must be among {sorted(known)}"
    )
  if seeds < 1:
    raise ValueError(f"seeds={seeds}: must be 1 or more")
  workdir = writable(workdir, "workdir").resolve()
  bench = Bench(workdir, local)
  # Seeds share programs, of which only the latest are kept.
  for method in METHODS:
    for seed in range(seeds):
      done = workdir / "rows" / f"{method.name}-{seed}.json"
      if done.exists() or methods and method.name not in methods:
        continue
      rows = list(measure(bench, method, seed))
      done.parent.mkdir(exist_ok=True)
      part = done.with_suffix(".part")
      part.write_text(json.dumps(rows, indent=1))
      part.replace(done)
      learned_report.write(workdir)
  rows = learned_report.write(workdir)
  report.show(learned_report.table(rows))
  return rows


def from_command_line(given: Any) -> None:
  """`main` with the options of the command; programs are kept for reruns."""
  for option, value in rundir.shared_programs(given.workdir).items():
    jax.config.update(option, value)
  names = tuple(filter(None, given.methods.split(",")))
  main(given.workdir, names, given.seeds)


if __name__ == "__main__":
  from experiments import launch
  from experiments.command import Command, Option

  launch.start(
    Command(
      __doc__ or "",
      (
        launch.workdir(),
        Option("methods", str, "", "Names, comma separated; none: all."),
        Option("seeds", int, 3, "Runs of each."),
        Option("traceback", bool, False, "Show where an error comes from."),
      ),
    ),
    from_command_line,
  )
