"""What the sweep of language models measures on.

Recall and text, each a carrier: two small models trained here, or one
published checkpoint for both.
"""

import dataclasses
import pathlib
from typing import Annotated, Any

import numpy as np

from experiments import typed
from experiments.data import DATA, Recall, pipeline
from experiments.data.errors import DataError
from experiments.sweeps import probes
from experiments.sweeps.carriers import Carrier, Pretrained, Trained
from experiments.training.config import Config


@dataclasses.dataclass(frozen=True)
class Subject:
  """Two carriers, and what they are asked.

  Attributes:
    recall, text: the models; may be one.
    probes: questions to the first.
    windows: held-out text for the second, ids `[texts, n]`.
    origin: where the weights come from, in words.
  """

  recall: Carrier
  text: Carrier
  probes: list[probes.Probe]
  windows: np.ndarray
  origin: str


@dataclasses.dataclass(frozen=True)
class Carriers:
  """Two models trained here, or the finished runs in the workdir.

  Attributes:
    recall, text: configs of the runs.
    first: config of a shorter run that `recall` starts from: what matches what
      is learned in far fewer steps from short contexts. None: there is none.
  """

  recall: Config
  text: Config
  first: Config | None = None

  def __post_init__(self):
    if not isinstance(self.recall.data, Recall):
      raise ValueError("recall: its data must be name='recall'")

  def prepare(
    self, workdir: pathlib.Path, grid: probes.Grid, texts: int, length: int
  ) -> Subject:
    """Trains both unless that is done; `texts` windows of `length` tokens."""
    recall = self.recall
    if self.first is not None:
      Trained(self.first).prepare(workdir, "recall_first")
      recall = dataclasses.replace(recall, init=str(workdir / "recall_first"))
    recall = Trained(recall).prepare(workdir, "recall")
    text = Trained(self.text).prepare(workdir, "text")
    data = dataclasses.replace(self.text.data, length=length - 1, heldout=texts)
    return Subject(
      recall,
      text,
      probes.of_recall(self.recall.data, grid),
      pipeline.heldout_arrays(data)["tokens"],
      f"models trained here for {self.recall.steps} and"
      f" {self.text.steps} steps",
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A published model; needles stand in the text it reads.

  Attributes:
    checkpoint, revision, precision: see `carriers.Pretrained`.
    data: a text, one of `experiments.data`.
  """

  checkpoint: str
  data: Annotated[Any, typed.OneOf(DATA)]
  revision: str | None = None
  precision: str = "float32"

  def prepare(
    self, workdir: pathlib.Path, grid: probes.Grid, texts: int, length: int
  ) -> Subject:
    """Reads the checkpoint and as much text as is needed."""
    made = Pretrained(self.checkpoint, self.revision, self.precision)
    carrier = made.prepare(workdir)
    # At most about eight bytes a token, in all tokenizers that are used.
    count = 8 * max(texts * length, 4 * max(grid.lengths))
    corpus = bytes(self.data.corpus("test")[:count])
    ids = carrier.tokenizer.encode(corpus.decode(errors="ignore"))
    if len(ids) < texts * length:
      raise DataError(
        f"data: has {len(ids)} tokens, {texts} texts of {length} are asked for"
      )
    return Subject(
      carrier,
      carrier,
      probes.of_text(carrier.tokenizer, corpus, grid),
      np.asarray(ids[: texts * length]).reshape(texts, length),
      self.checkpoint,
    )


SUBJECTS = {"carriers": Carriers, "checkpoint": Checkpoint}
