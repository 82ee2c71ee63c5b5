"""ViT-B/16 with and without ToMe, ours and the official one, side by side.

    python scripts/bench_vit.py [--rounds 7] [--batch 8] [--r 13]
      [--tome_repo PATH]

Every candidate is a process of its own with its own thread pool. They are all
started and warmed up first; then each in turn runs one step while the others
sleep, so that a loaded machine hits all alike, and the best round counts:

  ours             our model, nothing reduced
  stock            the same architecture from Flax's own layers, so that no
                   ratio depends on our own baseline
  ours_tome        with ToMe
  ours_shapes      the same token counts, but the plan is a constant that drops
                   the last r tokens: the difference to ours_tome is the cost
                   of scoring, matching and merging
  torch            the same architecture in PyTorch, fused attention
  torch_tome       with the official functions of a checkout of
                   github.com/facebookresearch/ToMe, named by --tome_repo

Prints one tab-separated row for each: seconds (best and median), throughput
relative to `ours`, GFLOPs by the compiler's analysis, compilations in two
calls of one shape. The last two need PyTorch and are left out without it.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import time

JAX = ("ours", "stock", "ours_tome", "ours_shapes")
TORCH = ("torch", "torch_tome")


# ----- Ours -----


def drop_last(site):
  """A plan that nothing has to be computed for."""
  import jax.numpy as jnp

  from tokjax.plan import Assignment

  return Assignment.select(jnp.arange(site.keep), site.num_free)


def slots_of(name: str, r: int):
  """The slots of a candidate."""
  from tokjax import budgets, recipes
  from tokjax.reduce.reduction import Reduce
  from tokjax.slots import Slots

  budget = budgets.Constant(r)
  if name == "ours_tome":
    return recipes.get("tome", budget=budget)
  if name == "ours_shapes":
    return Slots(Reduce(drop_last, budget), proportional=True)
  return Slots()


def stock_vit():
  """ViT-B/16 of `flax.linen` layers with their exact GELU and attention."""
  import flax.linen as nn
  import jax.numpy as jnp

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      y = nn.LayerNorm()(x)
      x = x + nn.MultiHeadDotProductAttention(num_heads=12)(y, y)
      y = nn.Dense(3072)(nn.LayerNorm()(x))
      return x + nn.Dense(768)(nn.gelu(y, approximate=False))

  class Model(nn.Module):
    @nn.compact
    def __call__(self, images):
      x = nn.Conv(768, (16, 16), (16, 16), padding="VALID")(images)
      x = x.reshape(len(x), -1, 768)
      first = self.param("class", nn.initializers.zeros, (1, 1, 768))
      x = jnp.concatenate([jnp.tile(first, (len(x), 1, 1)), x], axis=1)
      place = self.param("place", nn.initializers.normal(0.02), (1, 197, 768))
      x = x + place
      for _ in range(12):
        x = Block()(x)
      return nn.Dense(1000)(nn.LayerNorm()(x)[:, 0]), {}

  return Model()


def forward_of(name: str, batch: int, r: int, config=None, dtype="float32"):
  """A candidate's jitted forward pass, and its parameters and images.

  Args:
    name: of the candidate.
    batch, r: images, and tokens that ToMe merges in each block.
    config: `ViTConfig`; None: ViT-B/16. The stock model is that in any case.
    dtype: of parameters, images and activations.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np

  from tokjax.models import ViT, ViTConfig

  config = config or ViTConfig()
  model = stock_vit()
  if name != "stock":
    model = ViT(config, slots_of(name, r), jnp.dtype(dtype))
  images = jnp.zeros((batch, *config.image_sides, 3), dtype) + 0.5
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.02, x.shape), dtype), shapes
  )
  images = jnp.asarray(rng.normal(size=images.shape), dtype)
  forward = jax.jit(lambda p, x: model.apply({"params": p}, x)[0])
  return forward, params, images


def build_jax(name: str, options: argparse.Namespace):
  """A step without arguments, its GFLOPs and compilations in two calls."""
  import jax

  from tokjax.analysis import cost

  compilations = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: (
      compilations.append(event)
      if event.endswith("backend_compile_duration")
      else None
    )
  )
  forward, params, images = forward_of(name, options.batch, options.r)
  compilations.clear()
  for _ in range(2):
    jax.block_until_ready(forward(params, images))
  count = len(compilations)
  compiled = forward.lower(params, images).compile()
  flops = cost.measure(forward, params, images, compiled=compiled).flops
  step = lambda: jax.block_until_ready(compiled(params, images))
  return step, {"gflops": flops / 1e9, "compilations": count}


# ----- PyTorch -----


def build_torch(name: str, options: argparse.Namespace):
  """A step without arguments."""
  import torch

  torch.manual_seed(0)
  merge = None
  if name == "torch_tome":
    path = f"{options.tome_repo}/tome/merge.py"
    spec = importlib.util.spec_from_file_location("tome_merge", path)
    merge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(merge)
  model = torch_vit(merge, options.r).eval()
  images = torch.randn(options.batch, 3, 224, 224)

  def step():
    with torch.inference_mode():
      model(images)

  return step, {}


def torch_vit(merge, r: int):
  """ViT-B/16; with `merge`, blocks and attention as the official patch has."""
  import torch
  from torch import nn

  class Block(nn.Module):
    def __init__(self, width=768, heads=12):
      super().__init__()
      self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
      self.heads = heads
      self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
      self.mlp = nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
      )

    def attend(self, x, size):
      b, n, d = x.shape
      qkv = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads)
      q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
      if merge is None:
        y = nn.functional.scaled_dot_product_attention(q, k, v)
      else:
        weight = (q * (d // self.heads) ** -0.5) @ k.transpose(-2, -1)
        if size is not None:
          weight = weight + size.log()[:, None, None, :, 0]
        y = weight.softmax(dim=-1) @ v
      return self.proj(y.transpose(1, 2).reshape(b, n, d)), k.mean(1)

    def forward(self, x, size):
      y, metric = self.attend(self.norm1(x), size)
      x = x + y
      if merge is not None:
        move, _ = merge.bipartite_soft_matching(metric, r, class_token=True)
        x, size = merge.merge_wavg(move, x, size)
      return x + self.mlp(self.norm2(x)), size

  class Model(nn.Module):
    def __init__(self):
      super().__init__()
      self.patch = nn.Conv2d(3, 768, 16, 16)
      self.first = nn.Parameter(torch.zeros(1, 1, 768))
      self.position = nn.Parameter(0.02 * torch.randn(1, 197, 768))
      self.blocks = nn.ModuleList(Block() for _ in range(12))
      self.norm, self.head = nn.LayerNorm(768), nn.Linear(768, 1000)

    def forward(self, images):
      x = self.patch(images).flatten(2).transpose(1, 2)
      x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.position
      size = None
      for block in self.blocks:
        x, size = block(x, size)
      return self.head(self.norm(x)[:, 0])

  return Model()


# ----- Processes -----


def work(name: str, options: argparse.Namespace) -> None:
  """A candidate: says what it is, then times one step for every line read."""
  build = build_jax if name in JAX else build_torch
  step, facts = build(name, options)
  for _ in range(2):
    step()
  print(json.dumps(facts), flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    step()
    print(time.perf_counter() - start, flush=True)


class Worker:
  """The other end of `work`."""

  def __init__(self, name: str, arguments: list[str]):
    self.name, self.seconds = name, []
    self._process = subprocess.Popen(
      [sys.executable, __file__, "--worker", name, *arguments],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    self.facts = json.loads(self._read())

  def _read(self) -> str:
    line = self._process.stdout.readline()
    if not line:
      raise SystemExit(f"{self.name} ended; its error is above")
    return line

  def step(self) -> None:
    self._process.stdin.write("go\n")
    self._process.stdin.flush()
    self.seconds.append(float(self._read()))

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()


def report(workers: list[Worker]) -> None:
  """The rows, and the shares and ratios that matter."""
  best = {w.name: min(w.seconds) for w in workers}
  print("name\tbest s\tmedian s\tthroughput\tGFLOPs\tcompilations")
  for w in workers:
    flops, count = w.facts.get("gflops"), w.facts.get("compilations", "-")
    print(
      f"{w.name}\t{best[w.name]:.3f}\t{statistics.median(w.seconds):.3f}"
      f"\t{best['ours'] / best[w.name]:.2f}x"
      f"\t{'-' if flops is None else f'{flops:.1f}'}\t{count}"
    )
  facts = {w.name: w.facts for w in workers}
  ratio = facts["ours"]["gflops"] / facts["ours_tome"]["gflops"]
  print(f"FLOPs of ours / ours_tome: {ratio:.2f}")
  stock = best["stock"] / best["ours_tome"]
  print(f"throughput of ours_tome / stock: {stock:.2f}")
  share = 1 - best["ours_shapes"] / best["ours_tome"]
  print(f"scoring, matching and merging: {share:.1%} of ours_tome's step")
  if "torch_tome" in best:
    against = best["torch_tome"] / best["ours_tome"]
    print(f"throughput of ours_tome / torch_tome: {against:.2f}")


def main() -> None:
  """Parses the command line and runs the candidates."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--r", type=int, default=13)
  parser.add_argument("--tome_repo", help="checkout of the official ToMe")
  parser.add_argument("--worker", choices=JAX + TORCH, help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.worker:
    return work(options.worker, options)
  names = list(JAX)
  if importlib.util.find_spec("torch"):
    names += TORCH if options.tome_repo else TORCH[:1]
  build = functools.partial(Worker, arguments=sys.argv[1:])
  workers = [build(name) for name in names]
  for _ in range(options.rounds):
    for worker in workers:
      worker.step()
  for worker in workers:
    worker.close()
  report(workers)


if __name__ == "__main__":
  main()
