"""What is measured: one system at one length and batch."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
  """A measurement.

  Attributes:
    system: see `scripts.against.systems.SYSTEMS`.
    checkpoint: folder or GGUF file.
    length: tokens of the longest prompt.
    batch: prompts; all but the first are shorter, each by an equal part.
    steps: tokens generated, the first one included.
    keep: part of the cache that compressing systems keep.
    precision: of weights, activations and caches.
  """

  system: str
  checkpoint: str
  length: int
  batch: int = 1
  steps: int = 32
  keep: float = 0.25
  precision: str = "float32"

  def __post_init__(self):
    if self.length < self.batch or self.batch < 1 or self.steps < 2:
      raise ValueError(
        f"length={self.length}, batch={self.batch}, steps={self.steps}: must be"
        " at least the batch, 1 and 2"
      )

  def prompts(self, vocabulary: int) -> list[list[int]]:
    """Ids that are drawn, the same for all systems."""
    rng = np.random.default_rng(self.length)
    lengths = [
      self.length * (self.batch - i) // self.batch for i in range(self.batch)
    ]
    return [rng.integers(0, vocabulary, n).tolist() for n in lengths]
