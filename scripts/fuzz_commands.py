"""Mistyped commands: each is refused in one line."""

import shutil

from scripts.fuzz_runs import Forking

DIGITS = "--config=configs/digits.py:runlocal"
TEXT = "configs/generate.py:runlocal"
NUMBERS = ("nan", "inf", "-1", "abc", "", "1e400", "0x", "[]", "None?")
# Module and flags; WORKDIR is a new folder, a set is a choice of values.
WRONG = (
  ("train", DIGITS, "--config.recipe.keep", ("0", "1.0000001", "nan", "True")),
  ("train", DIGITS, "--config.recipe.name", ("tomee", "", "nones", "0")),
  ("train", DIGITS, "--config.mesh.data", ("0", "3", "-2", "x", "True")),
  ("train", DIGITS, "--config.mesh.fsdp", ("0", "-1", "2")),
  ("train", DIGITS, "--config.batch_size", ("0", "-8", "4096", "x", "8.5")),
  ("train", DIGITS, "--config.steps", ("0", "-1", "1e3", "x")),
  ("train", DIGITS, "--config.optimizer.lr", NUMBERS),
  ("train", DIGITS, "--config.optimizer.b2", ("1.5", "1", "-0.1", "nan")),
  ("train", DIGITS, "--config.checkpoint.every", ("0", "-1", "x")),
  ("train", DIGITS, "--config.model.width", ("0", "-4", "x")),
  ("train", DIGITS, "--config.model.heads", ("0", "3", "x")),
  ("train", DIGITS, "--config.seed", ("-1", "4294967296", "x")),
  ("train", DIGITS, "--config.stepz", ("3",)),
  ("train", DIGITS, "--config.init", ("/nonexistent", "")),
  ("train", DIGITS, "--config.data.shift", ("-1", "x")),
  ("train", DIGITS, "--workdir", ("", "README.md", "README.md/x", "/dev/null")),
  ("train", DIGITS, "--profile", ("x", "5", "5:1", ":")),
  ("train", "", "--config", ("absent.py", "README.md", "", "configs")),
  ("train", "", "--config", ("configs/digits.py:x", f"{DIGITS[9:]}=x")),
  ("evaluate", "", "--keep", ("0.5", "nan", "x", "0", "2")),
  ("evaluate", "", "--recipe", ("tome", "", "x")),
  ("generate", "", "--config", tuple(
    f"{TEXT},{x}" for x in (
      "keep=0", "keep=nan", "keep=1.0000001", "keep=True", "keep=abc",
      "checkpoint=", "checkpoint=/nonexistent", "recipe=", "recipe=snapkw",
      "recipe=snapkv,window=abc", "recipe=snapkv,keep=0.5,window=-1",
      "recipe=snapkv,keep=0.5,kernel=0", "recipe=full,x=1", "recipe=tome",
    )
  )),
  ("generate", f"--config={TEXT}", "--config.capacity", ("0", "-1", "x")),
  ("generate", f"--config={TEXT}", "--config.tokens", ("0", "-1", "x")),
  ("generate", f"--config={TEXT}", "--config.chunk", ("0", "-1", "x")),
  ("generate", f"--config={TEXT}", "--config.sampler.temperature",
   ("nan", "-1", "inf")),
  ("generate", f"--config={TEXT}", "--config.sampler.top_p", ("0", "2", "nan")),
  ("generate", f"--config={TEXT}", "--prompt", ("",)),
)  # fmt: skip


class Mistyped(Forking):
  """A wrong setting of a command: one line that begins with `error:`."""

  def case(self, rng):
    module, first, flag, values = WRONG[rng.integers(len(WRONG))]
    value = values[rng.integers(len(values))]
    if self.planted:
      module, first, flag, value = "train", DIGITS, "--config.seed", "1"
    folder = self.folder / str(rng.integers(2**62))
    flags = [f"{flag}={value}", *filter(None, [first])]
    if flag != "--workdir":
      flags.append(f"--workdir={folder}")
    # A config comes before what changes it.
    flags.sort(key=lambda x: not x.startswith("--config="))
    log = self.folder / "log"
    log.unlink(missing_ok=True)
    child = self.server.command(log, f"experiments.{module}", *flags)
    status = child.wait(120)
    shutil.rmtree(folder, ignore_errors=True)
    lines = child.output.strip().splitlines()
    command = f"experiments.{module} {' '.join(flags)}"
    assert status == 1, f"{command}: status {status}\n{child.output[-2000:]}"
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], (
      f"{command}\n{child.output[-2000:]}"
    )
    yield module


STAGES = {"mistyped": Mistyped}
