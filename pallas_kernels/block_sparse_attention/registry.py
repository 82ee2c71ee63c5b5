"""The implementations of block-sparse attention by name."""

from pallas_kernels import choice


def implementations():
  """Returns all implementations, `{name: Implementation}`, best first."""
  return choice.implementations("pallas_kernels.block_sparse_attention")


def resolve(operands, params, implementation=None, platform=None):
  """Chooses for a call in canonical form (see `contract` and `choice`)."""
  return choice.choose(
    implementations(), (operands, params), implementation, platform
  )
