"""The same run on one device, on eight, and in two processes."""

import pathlib
import re
import signal
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments import train
from experiments.training import config as config_lib
from experiments.training import mesh as mesh_lib
from tests.experiments import tiny
from tests.experiments.fork_server import Child
from tokjax import recipes
from tokjax.models import ViT, ViTConfig

# Its tests share runs.
pytestmark = pytest.mark.xdist_group("scale")
MODEL = dict(
  name="vit", image_size=8, patch_size=4, channels=1, width=16, depth=1,
  heads=2, mlp_dim=32, num_classes=10,
)  # fmt: skip
MESHES = {
  "data": dict(data=8),
  "fsdp": dict(data=2, fsdp=4),
  "model": dict(data=2, fsdp=2, model=2),
}


def config(**changes):
  return tiny.config(model=MODEL, **changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, fork_server):
  """Losses on one device."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  child = fork_server.run(workdir, config())
  assert child.wait() == 0, child.output
  return tiny.losses(workdir)


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_give_the_losses_of_one(name, alone, tmp_path):
  run = train.main(config(mesh=MESHES[name]), tmp_path)
  np.testing.assert_allclose(tiny.losses(tmp_path), alone, rtol=1e-4)
  kernel = run.params["encoder"]["block_0"]["mlp"]["fc1"]["kernel"]
  axes = {
    "data": P(None, None),
    "fsdp": P(None, "fsdp"),
    "model": P("fsdp", "model"),
  }
  wanted = jax.sharding.NamedSharding(kernel.sharding.mesh, axes[name])
  assert kernel.sharding.is_equivalent_to(wanted, kernel.ndim)


def test_parts_of_a_batch_over_devices(alone, tmp_path):
  rules = dict(lr=1e-3, warmup=2, ema=0.9, accumulate=2)
  train.main(config(optimizer=rules, batch_size=32, steps=2), tmp_path)
  assert len(tiny.losses(tmp_path)) == 2


def wait_for_step(workdir: pathlib.Path, step: int, children) -> None:
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline:
    if (workdir / "metrics.jsonl").exists() and step in tiny.rows(workdir):
      return
    for child in children:
      assert child.poll() is None, child.output
    time.sleep(0.05)
  raise AssertionError(f"step {step} was not reached")


@pytest.mark.slow
def test_two_processes(fork_server, tmp_path):
  """Losses; SIGTERM to one stops both in order; a killed one loses nothing."""
  long = config(
    steps=5000, checkpoint=dict(every=4, keep=2),
    task=dict(name="classification"),
    optimizer=dict(lr=1e-3, warmup=2, ema=0.9, schedule="constant"),
  )  # fmt: skip
  reference = tmp_path / "reference"
  train.main({**long, "steps": 12}, reference)
  expected = tiny.losses(reference)
  two = tmp_path / "two"

  def start_two() -> list[Child]:
    with socket.socket() as s:
      s.bind(("localhost", 0))
      address = f"localhost:{s.getsockname()[1]}"
    return [fork_server.run(two, long, 4, (address, 2, i)) for i in range(2)]

  children = start_two()
  wait_for_step(two, 12, children)
  children[1].send(signal.SIGTERM)
  assert [c.wait() for c in children] == [0, 0], [c.output for c in children]
  assert "SIGTERM: saved step" in children[0].output
  np.testing.assert_allclose(tiny.losses(two)[:12], expected, rtol=1e-4)
  stopped = max(tiny.rows(two))

  children = start_two()
  wait_for_step(two, stopped + 12, children)
  children[1].send(signal.SIGKILL)
  children[1].wait()
  time.sleep(1.0)
  children[0].send(signal.SIGKILL)
  children[0].wait()
  assert f"resumed at step {stopped}" in children[0].output

  saved = [
    int(p.name) for p in (two / "checkpoints").iterdir() if p.name.isdigit()
  ]
  # Of the two saves before the kill, the later may still be under way.
  assert max(saved) >= stopped + 4
  logged = max(tiny.rows(two))
  child = fork_server.run(two, long)
  # Rows behind the checkpoint are still there when it starts.
  wait_for_step(two, logged + 3, [child])
  child.send(signal.SIGTERM)
  assert child.wait() == 0 and f"resumed at step {max(saved)}" in child.output


COLLECTIVE = re.compile(
  r"\b(all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\b"
)
SMALL = ViTConfig(
  image_size=6, patch_size=1, channels=1, width=8, depth=2, heads=2, mlp_dim=16,
  num_classes=10,
)  # fmt: skip


@pytest.mark.parametrize(
  "name", recipes.names("vision") + recipes.names("baseline")
)
def test_no_recipe_adds_a_collective(name):
  """Forward pass and gradient of the tokens' path, batch over eight devices.

  The gradient is that of the images: parameters' gradients are summed over
  devices in every model.
  """
  mesh = mesh_lib.Mesh().build()
  model = ViT(SMALL, recipes.get(name, keep=0.6))
  images = jax.ShapeDtypeStruct(
    (16, 6, 6, 1), jnp.float32, sharding=mesh_lib.batch_sharding(mesh)
  )
  params = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 6, 6, 1)), key=jax.random.key(0)
    )
  )
  params = mesh_lib.with_sharding(mesh, params)

  def each_loss(params, images):
    key = jax.random.key(0)
    logits, pull = jax.vjp(
      lambda x: model.apply(params, x, key=key, train=True)[0], images
    )
    return logits, pull(jnp.ones_like(logits))

  text = jax.jit(each_loss).lower(params, images).compile().as_text()
  assert not COLLECTIVE.findall(text)


@pytest.mark.parametrize(
  "sizes, message",
  [
    (dict(data=3), "must multiply to the 8 devices"),
    (dict(data=-1, fsdp=-1), "-1 once at most"),
    (dict(data=-1, fsdp=3), "must multiply to the 8 devices"),
  ],
)
def test_meshes_that_do_not_fit(sizes, message):
  with pytest.raises(ValueError, match=message):
    mesh_lib.Mesh(**sizes).build()


def test_hosts_read_the_parts_of_one_batch(monkeypatch):
  from experiments.data import pipeline

  settings = config_lib.load(config())
  whole = next(pipeline.train_batches(settings))
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  parts = []
  for host in range(2):
    monkeypatch.setattr(jax, "process_index", lambda: host)  # noqa: B023
    parts.append(next(pipeline.train_batches(settings)))
  for name, values in whole.items():
    both = np.concatenate([part[name] for part in parts])
    np.testing.assert_array_equal(values, both)
