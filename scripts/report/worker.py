"""The process that measures a stage.

python -m scripts.report.worker JOBS OPTIONS JOURNAL FIRST SKIPPED

It writes a JSON line when a row begins and one when it is there, so that what
was measured is known also if the process fails or hangs. `FIRST` is the row to
begin with: a process that died or was ended is started again behind the row
that it died of.
"""

import importlib
import json
import sys
import traceback
from typing import Any

import jax
import jax.numpy as jnp

from bench.clock import Unavailable
from scripts.report.jobs import Here, Job


def main(jobs: str, options: str, journal: str, first: str, wrong: str) -> None:
  """Runs the jobs from number `first` on.

  Args:
    jobs: "module:function" that returns them.
    options: of that function, JSON.
    journal: file that lines are added to.
    first: number of the first job.
    wrong: names of checks that went wrong, JSON.
  """
  with open(journal, "a", buffering=1) as file:
    note = lambda **line: file.write(json.dumps(line) + "\n")
    try:
      found = made(jobs, **json.loads(options))
    except Exception as error:
      note(failed=said(error))
      raise
    note(device=device(), names=[job.name for job in found])
    for number, job in list(enumerate(found))[int(first) :]:
      note(begun=number)
      fields = row(job, json.loads(wrong))
      note(row={"name": job.name, **fields})
      if "error" in fields:
        # After a fault of a kernel every call fails: this process has to end.
        jax.clear_caches()
        jax.block_until_ready(jnp.zeros(8) + 1)


def made(jobs: str, **options: Any) -> list[Job]:
  """The jobs of a stage; at tiny sizes compiling is all that takes time."""
  here = Here.found()
  jax.config.update("jax_disable_most_optimizations", here.tiny)
  module, _, function = jobs.partition(":")
  return getattr(importlib.import_module(module), function)(here, **options)


def row(job: Job, wrong: list[str]) -> dict[str, Any]:
  """A job's fields, or why there are none."""
  for check in job.rests_on:
    if check in wrong:
      return {"skipped": f"the check {check!r} went wrong"}
  try:
    return job.run()
  except (NotImplementedError, Unavailable) as error:
    return {"skipped": said(error)}
  except Exception as error:
    traceback.print_exc()
    return {"error": said(error)}


def said(error: Exception) -> str:
  """An exception on one line that fits a table; the log has all of it."""
  lines = str(error).strip().splitlines() or [""]
  text = f"{type(error).__name__}: {lines[0]}".strip()
  return text if len(text) <= 300 else text[:297] + "..."


def device() -> dict[str, Any]:
  """What JAX says of the device."""
  one, client = jax.devices()[0], jax.devices()[0].client
  return {
    "platform": jax.default_backend(),
    "device": one.device_kind,
    "devices": jax.device_count(),
    "runtime": client.platform_version.strip().splitlines()[-1],
  }


if __name__ == "__main__":
  main(*sys.argv[1:])
