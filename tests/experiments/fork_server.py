"""Starts runs and commands quickly: forks of a process that has imported all.

Importing takes longer than such a run. The server never touches a device, so
that every child chooses its own.
"""

import json
import os
import pathlib
import runpy
import subprocess
import sys
import time
import traceback
from typing import Any

import jax

from experiments import evaluate, generate, train  # noqa: F401
from experiments.data import digits

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Child:
  """A run in a process of its own."""

  def __init__(self, server: "ForkServer", pid: int, log: pathlib.Path):
    self._server, self.pid, self._log = server, pid, log
    self._status: int | None = None

  @property
  def output(self) -> str:
    return self._log.read_text()

  def poll(self) -> int | None:
    """Exit status (negative: the signal that ended it), None while it runs."""
    if self._status is None:
      self._status = self._server.ask(poll=self.pid)
    return self._status

  def wait(self, seconds: float = 240) -> int:
    deadline = time.monotonic() + seconds
    while self.poll() is None:
      assert time.monotonic() < deadline, self.output
      time.sleep(0.01)
    return self._status

  def send(self, signal: int) -> None:
    if self.poll() is None:
      os.kill(self.pid, signal)


class ForkServer:
  """Starts children; the server lives as long as the context."""

  def __enter__(self):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    self._process = subprocess.Popen(
      [sys.executable, "-m", "tests.experiments.fork_server"],
      cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      text=True,
    )  # fmt: skip
    return self

  def __exit__(self, *_):
    self._process.communicate()

  def ask(self, **request: Any) -> Any:
    self._process.stdin.write(json.dumps(request) + "\n")
    self._process.stdin.flush()
    return json.loads(self._process.stdout.readline())

  def run(
    self,
    workdir: pathlib.Path,
    config: dict[str, Any],
    devices: int = 1,
    hosts: tuple[str, int, int] | None = None,
  ) -> Child:
    """Trains in a new process, on virtual devices.

    Args:
      hosts: address of the first process, their number and which it is.
    """
    log = workdir.with_name(f"{workdir.name}-{time.monotonic_ns()}.log")
    request = dict(
      workdir=str(workdir), config=config, devices=devices, hosts=hosts
    )
    return Child(self, self.ask(**request, log=str(log)), log)

  def command(
    self, log: pathlib.Path, module: str, *flags: str, devices: int = 1
  ) -> Child:
    """Runs `python -m module flags...`; what it prints goes to `log`."""
    request = dict(argv=[module, *flags], devices=devices, log=str(log))
    return Child(self, self.ask(**request), log)


def _run(request: dict[str, Any]) -> None:
  """What a child does."""
  log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
  os.dup2(log, 1)
  os.dup2(log, 2)
  devices = request["devices"]
  os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('TOKJAX_TEST_FLAGS', '')}"
    f" --xla_force_host_platform_device_count={devices}"
  )
  if "argv" in request:
    module, *flags = request["argv"]
    sys.argv = [module, *flags]
    # As if it had not been imported: runpy would warn.
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return
  if request["hosts"]:
    jax.distributed.initialize(*request["hosts"])
  train.main(request["config"], request["workdir"])
  sys.stdout.flush()
  if request["hosts"]:
    jax.distributed.shutdown()


def _fork(request: dict[str, Any]) -> int:
  child = os.fork()
  if child:
    return child
  status = 1
  try:
    _run(request)
    status = 0
  except SystemExit as end:
    status = end.code if isinstance(end.code, int) else int(bool(end.code))
    if isinstance(end.code, str):
      print(end.code, file=sys.stderr)
  except BaseException:
    traceback.print_exc()
  finally:
    # At once: what Python does at its end is of the server's modules.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
  """Answers each line of stdin: {"poll": pid}, or a child to start."""
  digits.load()
  for line in sys.stdin:
    request = json.loads(line)
    if "poll" in request:
      ended, status = os.waitpid(request["poll"], os.WNOHANG)
      answer = os.waitstatus_to_exitcode(status) if ended else None
    else:
      answer = _fork(request)
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
