"""What a layer's attention to a prompt costs, in seconds of a CPU.

    python scripts/bench_layer.py [--tokens 2048 4096 8192] [--budget 1024]
      [--methods full cca] [--out DIR]

One layer (16 query heads, 4 key heads of 64), random queries, keys and values.
Seconds of all cores together are counted, not those that pass: other programs
on the machine change them little. Each query reads `--budget` tokens and those
that a method always reads; `lemo` keeps half of the blocks, which its networks
choose. Prints one tab-separated row for each length; with --out also a plot,
`layer.png`.
"""

import argparse
import collections
import pathlib
import time

import jax
import jax.numpy as jnp

from tokjax import budgets
from tokjax.analysis import lengths
from tokjax.attention.block_memory import BlockMemory
from tokjax.attention.causal import Causal
from tokjax.attention.core_context import CoreContext
from tokjax.attention.dynamic_chunks import DynamicChunks
from tokjax.attention.eliminated import Eliminated
from tokjax.attention.estimated import Antidiagonal, VerticalSlash
from tokjax.attention.head_chunks import HeadChunks
from tokjax.attention.matched_codes import MatchedCodes
from tokjax.attention.probe_query import ProbeQuery
from tokjax.attention.soft_vote import SoftVote
from tokjax.attention.static import Band
from tokjax.layer import Arrivals, Layer, Memory

LAYER = Layer(0, 1, heads=16, kv_heads=4, head_dim=64)
WIDTH = 16 * 64
ALL = (
  "full", "streaming_llm", "minference_a_shape", "minference_vertical_slash",
  "xattention", "tokenselect", "longheads", "cca", "lemo", "dhsa", "infllm",
  "actqkv", "spt",
)  # fmt: skip


def arrivals(tokens: int) -> Arrivals:
  """A prompt of noise."""
  of = lambda i, heads: jax.random.normal(
    jax.random.key(i), (1, tokens, heads, LAYER.head_dim)
  )
  place = jnp.arange(tokens)[None]
  return Arrivals(
    of(0, LAYER.heads), of(1, LAYER.kv_heads), of(2, LAYER.kv_heads), place,
    place >= 0, x=jax.random.normal(jax.random.key(4), (1, tokens, WIDTH)),
  )  # fmt: skip


def seconds(attend, prompt: Arrivals) -> float:
  """Of a CPU, for the better of two calls."""
  made = attend.parameters(LAYER, WIDTH, jax.random.key(3))
  params = {} if made is None else {"attend": made}

  @jax.jit
  def run(prompt, params):
    memory = Memory.of(prompt)
    return attend(LAYER, prompt, memory, params=params, carry={})[0]

  jax.block_until_ready(run(prompt, params))
  found = []
  for _ in range(2):
    began = time.process_time()
    jax.block_until_ready(run(prompt, params))
    found.append(time.process_time() - began)
  return min(found)


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--tokens", type=int, nargs="+",
                      default=[2048, 4096, 8192, 16384])  # fmt: skip
  parser.add_argument("--budget", type=int, default=1024)
  parser.add_argument("--methods", nargs="+", choices=ALL, default=[*ALL])
  parser.add_argument("--out", type=pathlib.Path)
  args = parser.parse_args()
  budget, half = (budgets.Count(n) for n in (args.budget, args.budget // 2))
  methods = {
    "full": Causal(),
    "streaming_llm": Band(4, budget, reindexed=True),
    "minference_a_shape": Band(128, budget),
    "minference_vertical_slash": VerticalSlash(half, half),
    "xattention": Antidiagonal(0.9),
    "tokenselect": SoftVote(128, 512, half),
    "longheads": HeadChunks(budget),
    "cca": CoreContext(local=budget),
    "lemo": Eliminated(budgets.Share(0.5), from_layer=0, to_end=True),
    "dhsa": DynamicChunks(budget),
    "infllm": BlockMemory(128, 1024, budget),
    "actqkv": ProbeQuery(128, 1024, budget, least=1),
    "spt": MatchedCodes(budget),
  }
  curves = collections.defaultdict(list)
  print("tokens", *args.methods, sep="\t")
  for tokens in args.tokens:
    prompt = arrivals(tokens)
    for name in args.methods:
      curves[name].append((tokens, seconds(methods[name], prompt)))
    row = [f"{points[-1][1]:.2f}" for points in curves.values()]
    print(tokens, *row, sep="\t", flush=True)
  if args.out:
    lengths.draw(
      curves, args.out / "layer.png", title="Attention of a layer to a prompt",
      note="budgets of 1024 tokens", reference="full",
      x_label="tokens of a prompt", y_label="seconds of a CPU",
    )  # fmt: skip


if __name__ == "__main__":
  main()
