"""Runs the documented command of every config in its short form.

  python scripts/smoke.py [--workers 2] [configs/digits.py ...]

The command is the first `python -m experiments...` of the config's docstring,
with the argument `runlocal`. Configs whose data or weights have to be fetched
first are loaded and checked, but not run; which ones is printed.
"""

import argparse
import concurrent.futures
import importlib
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMAND = re.compile(r"python -m (experiments\.(?:train|sweep|\w+))\s")


def configs(paths: list[str]) -> dict[str, object]:
  """Modules with a `get_config` by their path, all of `configs/` by default."""
  found = {}
  names = paths or sorted(
    str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.py")
  )
  for name in names:
    module = importlib.import_module(
      name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    )
    if hasattr(module, "get_config"):
      found[name] = module
  return found


def fetched(config) -> str:
  """What a config needs that is not on every machine, empty if nothing."""
  subject = config.get("subject", config)
  if subject.get("name") in ("pretrained", "checkpoint", "dense"):
    return f"the checkpoint {subject.checkpoint}"
  data = subject.get("train", subject).get("data")
  if data is None:
    return ""
  if data.name.startswith("tfds"):
    return f"the prepared dataset {data.builder}"
  return ""


def entry_point(module) -> str:
  """The module that the config's documentation runs it with."""
  for name in COMMAND.findall(module.__doc__ or ""):
    if hasattr(importlib.import_module(name), "load") or name.endswith("train"):
      return name
  raise SystemExit(f"{module.__name__}: its docstring shows no command")


def check(name: str, module) -> str:
  """Loads a config into its typed form; an error names the key."""
  entry = importlib.import_module(entry_point(module))
  load = getattr(entry, "load", None)
  if load is None:
    load = importlib.import_module("experiments.training.config").load
  load(module.get_config())
  return f"{name}: loads; not run, it needs {fetched(module.get_config())}"


def smoke(name: str, module) -> str:
  """Runs a config; returns a line for the log, raises if it fails."""
  if fetched(module.get_config()):
    return check(name, module)
  start = time.monotonic()
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, "-m", entry_point(module)]
    command += ["--config", f"{name}:runlocal", "--workdir", workdir]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    wrote = list(pathlib.Path(workdir).iterdir())
  if run.returncode or not wrote:
    sys.stderr.write(run.stdout[-2000:] + run.stderr[-4000:])
    raise RuntimeError(f"{name}: exit status {run.returncode}")
  return f"{name}: ran in {time.monotonic() - start:.0f} s"


def main() -> None:
  """Smokes the configs named on the command line, or all."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("configs", nargs="*")
  args = parser.parse_args()
  sys.path.insert(0, str(ROOT))
  modules = configs(args.configs)
  if not modules:
    raise SystemExit("no configs found")
  with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
    for line in pool.map(smoke, modules, modules.values()):
      print(line, flush=True)
  print(f"{len(modules)} configs passed")


if __name__ == "__main__":
  main()
