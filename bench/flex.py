"""FlexAttention over the same block lists, where PyTorch is installed."""

import importlib.util

import numpy as np

from bench.candidates import Candidate, Unavailable
from pallas_kernels import layout as layouts


def block_mask(layout: layouts.BlockLayout, device: str):
  """PyTorch's `BlockMask` of a layout of full blocks `[b, h, ...]`.

  Only full blocks are converted: partial ones need their mask as a function
  of PyTorch.

  Raises:
    ValueError: the layout lists partial blocks.
  """
  import torch
  from torch.nn.attention import flex_attention

  if int(np.max(layout.partial_count, initial=0)):
    raise ValueError("the layout has partial blocks; only full ones convert")
  tensors = {
    name: torch.tensor(np.asarray(x), device=device)
    for name, x in layouts.to_flex(layout).items()
  }
  return flex_attention.BlockMask.from_kv_blocks(
    **tensors,
    BLOCK_SIZE=(layout.block_q, layout.block_k),
    seq_lengths=(layout.q_len, layout.k_len),
  )


def candidate(
  layout: layouts.BlockLayout, inputs, direction: str, on_cpu: bool
) -> Candidate:
  """FlexAttention, compiled; the lists are made before and not timed.

  Raises:
    Unavailable: without PyTorch; on a CPU unless `on_cpu` asks for it (its
      compiler runs a C++ compiler for a minute), and backward there always.
  """
  if importlib.util.find_spec("torch") is None:
    raise Unavailable("PyTorch is not installed")
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  if device == "cpu" and not on_cpu:
    raise Unavailable("PyTorch has no GPU here, and config.flex_on_cpu is off")
  if device == "cpu" and direction == "backward":
    raise Unavailable("FlexAttention has no backward pass on a CPU")
  return _compiled(layout, inputs, direction, device)


def _compiled(layout, inputs, direction, device):
  """The candidate, after a first call."""
  import torch
  from torch.nn.attention import flex_attention

  dtype = getattr(torch, str(inputs[0].dtype))
  grad = direction == "backward"
  q, k, v = (
    torch.tensor(np.asarray(x, np.float32).swapaxes(1, 2), device=device)
    .to(dtype)
    .contiguous()
    .requires_grad_(grad)
    for x in inputs
  )
  mask = block_mask(layout, device)
  attend = torch.compile(flex_attention.flex_attention)
  options = {"block_mask": mask, "enable_gqa": q.shape[1] != k.shape[1]}
  out = attend(q, k, v, **options)
  ones = torch.ones_like(out)

  def run():
    if grad:
      return torch.autograd.grad(out, (q, k, v), ones, retain_graph=True)
    with torch.no_grad():
      return attend(q, k, v, **options)

  def wait(result):
    if device == "cuda":
      torch.cuda.synchronize()
    return result

  wait(run())
  density = float(np.mean(layout.density()))
  return Candidate("flex", density, run, wait)
