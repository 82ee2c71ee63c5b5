"""Stage a: block-sparse attention against float64.

With the cases that the tests put through Pallas's GPU simulator, at one head
size, and some that are larger.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import block_sparse_attention
from pallas_kernels import layout as layouts
from scripts.report import exact
from scripts.report.jobs import Here, Job
from tests.kernels.cases import LARGE, Case, inputs, mask_and_layout, wide

_GROUPED = {"heads": 4, "groups": 2}
# What later stages time comes first.
CASES = (
  wide("causal", q_len=384, k_len=384, mask=layouts.Causal(), **_GROUPED),
  wide("top-k", batch=2, q_len=512, k_len=512, mask="blocks", **_GROUPED),
  wide("causal top-k", q_len=512, k_len=512, mask="causal blocks", **_GROUPED),
  wide("full", q_len=512, k_len=512, mask=layouts.Full()),
  wide(
    "top-k, blocks of 64", q_len=512, k_len=512, mask="blocks", block_q=64,
    block_k=64, **_GROUPED,
  ),
  wide(
    "per head", q_len=384, k_len=384, bias=True,
    mask=layouts.PerHead((layouts.Causal(), layouts.Window(70, 70))),
  ),
  # Two that differ from others in their head sizes come last.
  *sorted(LARGE, key=lambda case: case.name in ("wide", "capped")),
  wide("top-k, long", q_len=2048, k_len=2048, mask="blocks", **_GROUPED),
)  # fmt: skip


def name(head_size: int, case: str) -> str:
  """Of the check that something timed rests on."""
  return f"attention {head_size}, {case}"


def jobs(here: Here, head_size: int) -> list[Job]:
  """One check for each case."""
  chosen = CASES
  if here.tiny:
    chosen = CASES[1:2]
  sized = [
    dataclasses.replace(case, width=head_size, v_width=head_size)
    for case in chosen
  ]
  if here.tiny:
    sized = [_eighth(case) for case in sized]
  return [
    Job(name(head_size, case.name), lambda case=case: check(here, case))
    for case in sized
  ]


def _eighth(case: Case) -> Case:
  """The case with all sizes divided by eight."""
  sizes = ("q_len", "k_len", "width", "v_width", "block_q", "block_k")
  return dataclasses.replace(
    case, **{size: getattr(case, size) // 8 for size in sizes}
  )


def check(here: Here, case: Case) -> dict:
  """Results, log-sum-exps and all gradients of a case."""
  arrays = inputs(case, jnp.bfloat16)
  _, layout = mask_and_layout(case)

  def call(arrays, layout, implementation):
    options = dict(arrays)
    q, k, v = (options.pop(name) for name in "qkv")
    return block_sparse_attention(
      q, k, v, layout, **options, soft_cap=case.soft_cap, return_lse=True,
      implementation=implementation,
    )  # fmt: skip

  # Of tiny sizes one is enough: they all run the same program then.
  backward = not here.tiny or case.width * 8 == 128
  return exact.check(call, arrays, layout, here.kernel, backward)
