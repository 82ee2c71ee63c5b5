"""Random values: configs, published weights, inputs of recipes and kernels."""

import copy
import functools
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments import typed
from experiments.training import config as config_lib
from pallas_kernels import (
  attention_mass,
  block_sparse_attention,
  decode_attention,
  linear_attention,
)
from pallas_kernels import layout as layouts
from scripts.fuzz_runs import HARMS, Stage
from tests.contract import hosts
from tests.decoder import models as decoders
from tests.interop import checkpoints as published
from tests.kernels import oracle
from tokjax import interop, recipes
from tokjax.models import Generator

VALUES = (
  None, True, False, 0, -1, 1, 3, 2**70, 0.0, -0.5, 1.0000001, float("nan"),
  float("inf"), "", "abc", "nan", (), ("a",), [], [1, [2]], {}, {"name": "x"},
)  # fmt: skip


def replace_one(tree: dict, rng: np.random.Generator, values=VALUES) -> str:
  """Gives a random entry of nested dictionaries a random value."""
  path, node = [], tree
  while True:
    key = sorted(node)[rng.integers(len(node))]
    path.append(key)
    if isinstance(node[key], dict) and node[key] and rng.random() < 0.9:
      node = node[key]
      continue
    node[key] = copy.deepcopy(values[rng.integers(len(values))])
    return f"{'.'.join(path)}={node[key]!r}"


class Configs(Stage):
  """A wrong value in a shipped config: a ConfigError, or a config as good."""

  NAMES = ("digits", "cifar", "imagenet", "text", "recall")

  def case(self, rng):
    for _ in range(50):
      name = self.NAMES[rng.integers(len(self.NAMES))]
      module = importlib.import_module(f"configs.{name}")
      values = module.get_config().to_dict()
      changed = replace_one(values, rng)
      try:
        config = config_lib.load(values)
        if self.planted:
          raise TypeError("planted")
        if config_lib.load(config.to_dict()) != config:
          raise AssertionError("its plain values make another config")
        config.recipe.slots()
      except typed.ConfigError as error:
        assert len(str(error)) < 3000
        yield "refused"
      except Exception as error:
        raise AssertionError(f"{name}: {changed}") from error
      else:
        yield "accepted"


class Weights(Stage):
  """A damaged or edited published checkpoint: an error that says so."""

  ERRORS = (ValueError, OSError, interop.CheckpointError)

  def __init__(self, planted: bool):
    super().__init__(planted)
    if planted:
      self.ERRORS = ()
    published.write(self.folder)
    self.whole = {
      p: p.read_bytes() for p in self.folder.iterdir() if p.is_file()
    }

  def case(self, rng):
    path = sorted(self.whole)[rng.integers(len(self.whole))]
    what = self.change(path, rng)
    try:
      model, params, _ = interop.load(self.folder)
      text = jnp.zeros((1, 3), jnp.int32)
      logits = jax.eval_shape(model.apply, {"params": params}, text)[0]
      assert logits.shape[:2] == (1, 3)
    except self.ERRORS:
      yield "refused"
    except Exception as error:
      raise AssertionError(what) from error
    else:
      yield "accepted"
      bad = [x for x in jax.tree.leaves(params) if not np.isfinite(x).all()]
      assert not bad, f"{what}: weights that are not finite"
    finally:
      for file, content in self.whole.items():
        file.write_bytes(content)

  def change(self, path: pathlib.Path, rng: np.random.Generator) -> str:
    if path.suffix == ".json" and rng.random() < 0.8:
      values = json.loads(self.whole[path])
      changed = replace_one(values, rng)
      path.write_text(json.dumps(values))
      return f"{path.name}: {changed}"
    harm = rng.choice([*HARMS])
    HARMS[harm](path, self.whole[path], rng)
    return f"{path.name}: {harm}"


class Recipes(Stage):
  """Random inputs of every recipe: finite, and a batch equals each alone."""

  def __init__(self, planted: bool):
    super().__init__(planted)
    self.order: list[str] = []

  def case(self, rng):
    if not self.order:
      self.order = [*rng.permutation(recipes.names())]
    name = str(self.order.pop())
    family = recipes.find(name).family
    run = self.decode if family in hosts.DecoderHost.families else self.encode
    yield from run(name, rng)

  def encode(self, name: str, rng):
    keep = float(rng.choice([0.3, 0.5, 0.8]))
    found = hosts.hosts_of(name, keep)
    host = found[rng.integers(len(found))]
    model = host.build(recipes.get(name, keep=keep))
    params, side = host.params(model), host.config.image_size
    key = jax.random.key(0)
    forward = jax.jit(
      lambda params, images: model.apply({"params": params}, images, key=key)[0]
    )
    for kind in ("normal", "large", "small", "two values"):
      images = rng.normal(size=(3, side, side, 3)).astype(np.float32)
      images *= {"large": 1e3, "small": 1e-3}.get(kind, 1.0)
      if kind == "two values":
        images = (images > 0).astype(np.float32)
      together = np.asarray(forward(params, images))
      if self.planted:
        together = together + 1
      assert np.isfinite(together).all(), f"{name} keep={keep} {kind}"
      yield "vision inputs"
      # Equal scores may be broken otherwise in a program of another shape.
      if kind == "normal" and not model.slots.needs_key:
        alone = np.asarray(forward(params, images[:1]))
        np.testing.assert_allclose(
          together[:1], alone, rtol=2e-3, atol=2e-3, err_msg=name
        )

  def decode(self, name: str, rng):
    keep = float(rng.choice([0.4, 0.7, 1.0]))
    try:
      slots = recipes.get(name, keep=keep)
      model = decoders.decoder(slots)
      params = decoders.params_of(model.config, slots)
      made = Generator(model, params, capacity=24, decode=4, buckets=(24,))
      lengths = [int(n) for n in rng.integers(1, 25, size=3)]
      prompts = [rng.integers(40, size=n).tolist() for n in lengths]
      going = made.prefill(prompts)
    except (ValueError, NotImplementedError) as error:
      assert str(error)
      yield "refused"
      return
    assert np.isfinite(going.logits).all(), f"{name} keep={keep} {lengths}"
    texts = made.generate(prompts)
    # In a batch of the same size, so that nothing compiles again.
    for prompt, text in zip(prompts, texts, strict=True):
      alone = made.generate([prompt] * 3)[0]
      if self.planted:
        alone = [-1]
      assert text == alone, f"{name} keep={keep} {prompt}: {text} not {alone}"
      yield "texts"


class Kernels(Stage):
  """Every operation against float64 formulas, with x64 on and off."""

  def case(self, rng):
    name = [*OPERATIONS][rng.integers(len(OPERATIONS))]
    implementation = ("xla", "reference")[rng.integers(2)]
    x64 = bool(rng.integers(2))
    double = x64 and bool(rng.integers(2))
    dtype = np.float64 if double else np.float32
    what = f"{name} {implementation} x64={x64} {np.dtype(dtype).name}"
    try:
      with jax.enable_x64(x64):
        found, expected = OPERATIONS[name](rng, dtype, implementation)
        found = np.asarray(found)
    except Exception as error:
      raise AssertionError(what) from error
    if self.planted:
      found = found + 1e-3
    close = 1e-9 if double else 2e-5
    np.testing.assert_allclose(
      found, expected, rtol=close, atol=close, err_msg=what
    )
    yield f"{name} x64" if x64 else name


@functools.cache
def jitted(fn, **options):
  """One compilation for all calls of a shape."""
  return jax.jit(functools.partial(fn, **options))


def drawn(rng, dtype):
  """q, k, v of a random shape out of few, so that programs are shared."""
  q_len, k_len = int(rng.choice([1, 20, 32])), int(rng.choice([1, 24, 48]))
  groups = int(rng.choice([1, 2, 4]))
  shapes = (2, q_len, 4, 8), (2, k_len, groups, 8), (2, k_len, groups, 6)
  return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def masked(rng, q, k, v):
  """A random mask, its layout; NaN where it hides a key from all queries."""
  mask = rng.random((2, 4, q.shape[1], k.shape[1])) < rng.choice([0, 0.3, 0.9])
  if rng.random() < 0.3:
    hidden = rng.random(k.shape[1]) < 0.3
    mask[..., hidden] = False
    k[:, hidden], v[:, hidden] = np.nan, np.nan
  layout = jitted(layouts.from_mask, block_q=16, block_k=16)(mask)
  return mask, layout


def block_sparse(rng, dtype, implementation):
  """Random mask, grouped heads."""
  q, k, v = drawn(rng, dtype)
  mask, layout = masked(rng, q, k, v)
  run = jitted(
    block_sparse_attention, implementation=implementation, precision="highest"
  )
  exact = oracle.attention(q, np.nan_to_num(k), np.nan_to_num(v), mask)[0]
  return run(q, k, v, layout), exact


def column_sums(rng, dtype, implementation):
  """What every key receives."""
  q, k, v = drawn(rng, dtype)
  mask, layout = masked(rng, q, k, v)
  run = jitted(
    attention_mass, implementation=implementation, precision="highest"
  )
  exact = oracle.probabilities(q, np.nan_to_num(k), mask)["p"].sum(2)
  return run(q, k, layout=layout), exact


def decode(rng, dtype, implementation):
  """Caches filled to random lengths."""
  q, k, v = drawn(rng, dtype)
  lengths = rng.integers(0, k.shape[1] + 1, size=2)
  there = np.arange(k.shape[1]) < lengths[:, None]
  k[~there], v[~there] = np.nan, np.nan
  mask = np.broadcast_to(
    there[:, None, None], (2, 4, q.shape[1], k.shape[1])
  )
  splits = int(rng.choice([1, 3]))
  run = jitted(
    decode_attention, implementation=implementation, block_size=16,
    splits=splits,
  )  # fmt: skip
  exact = oracle.attention(q, np.nan_to_num(k), np.nan_to_num(v), mask)[0]
  return run(q, k, v, lengths=lengths), exact


def linear(rng, dtype, implementation):
  """Token after token, with decay."""
  _, k, v = drawn(rng, dtype)
  q = rng.normal(size=(2, k.shape[1], 4, 8)).astype(dtype)
  decay = -np.abs(rng.normal(size=4)).astype(dtype)
  run = jitted(
    linear_attention, implementation=implementation, block=16,
    precision="highest",
  )  # fmt: skip
  times = 4 // k.shape[2]
  wide = [np.asarray(np.repeat(x, times, 2), np.float64) for x in (k, v)]
  state, rows = np.zeros((2, 4, 8, 6)), []
  for t in range(k.shape[1]):
    new = np.einsum("bhd,bhe->bhde", wide[0][:, t], wide[1][:, t])
    state = np.exp(np.float64(decay))[:, None, None] * state + new
    rows.append(np.einsum("bhd,bhde->bhe", np.float64(q[:, t]), state))
  return run(q, k, v, log_decay=decay), np.stack(rows, 1)


OPERATIONS = {
  "block_sparse": block_sparse,
  "mass": column_sums,
  "decode": decode,
  "linear": linear,
}
STAGES = {
  "configs": Configs,
  "weights": Weights,
  "recipes": Recipes,
  "kernels": Kernels,
}
