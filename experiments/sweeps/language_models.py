"""Language models that generation and sweeps are run on.

Each is a decoder with weights and a tokenizer: a small one trained here (once
for each workdir), or a published checkpoint. Sweeps ask two of them, one for
recall and one for text, which may be the same checkpoint.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import numpy as np

from experiments import typed
from experiments.data import DATA, Recall, pipeline
from experiments.data.errors import DataError
from experiments.sweeps import probes
from experiments.sweeps.runs import trained
from experiments.training import config as config_lib
from experiments.training import trees
from tokjax import interop, zoo
from tokjax.models import Decoder, DecoderConfig
from tokjax.slots import Slots


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A language model to fill with recipes.

  Attributes:
    config: its architecture.
    params: its weights.
    dtype: of activations and caches.
    tokenizer: text to ids and back; None: its ids are no text.
    data: what it was trained on, if that was here.
    origin: where the weights come from, in words.
  """

  config: DecoderConfig
  params: Any
  dtype: Any
  tokenizer: Any
  data: Any
  origin: str

  def build(self, slots: Slots) -> Decoder:
    """The model with these slots."""
    return Decoder(self.config, slots, self.dtype)

  def params_for(self, model: Decoder) -> Any:
    """Its weights.

    Raises:
      ConfigError: the recipe learns something that is not among them.
    """
    trees.check_complete(model.slots.name, model, self.params)
    return self.params


@dataclasses.dataclass(frozen=True)
class Trained:
  """A model trained here, or the finished run in the workdir.

  Attributes:
    train: config of the run.
  """

  train: config_lib.Config

  def prepare(
    self, workdir: pathlib.Path, name: str = "train"
  ) -> LanguageModel:
    """Trains under `workdir / name` unless that is done."""
    params, data = trained(self.train, workdir / name), self.train.data
    is_text = data.num_classes == 256
    return LanguageModel(
      self.train.model,
      jax.device_put(params, jax.devices()[0]),
      config_lib.DTYPES[self.train.precision],
      interop.Bytes() if is_text else None,
      data,
      f"a model trained here for {self.train.steps} steps",
    )


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A published checkpoint.

  Attributes:
    checkpoint: folder, GGUF file or hub id, see `tokjax.interop.load`, or a
      name of `tokjax models`.
    revision: on the hub.
    precision: of activations, caches and parameters.
  """

  checkpoint: str
  revision: str | None = None
  precision: Literal["float32", "bfloat16"] = "float32"

  def prepare(
    self, workdir: pathlib.Path, name: str = "train"
  ) -> LanguageModel:
    """Reads it; nothing is written.

    Raises:
      ConfigError: the folder has no tokenizer.json.
    """
    del workdir, name
    return _read(self.checkpoint, self.revision, self.precision)


@functools.lru_cache(maxsize=1)
def _read(
  checkpoint: str, revision: str | None, precision: str
) -> LanguageModel:
  dtype = config_lib.DTYPES[precision]
  model, params, tokenizer = interop.load(
    zoo.resolve(checkpoint), dtype=dtype, param_dtype=dtype, revision=revision
  )
  if not isinstance(model, Decoder):
    raise ValueError(
      f"checkpoint={checkpoint!r}: is a {type(model).__name__}, no language"
      " model"
    )
  if tokenizer is None:
    raise typed.ConfigError(
      f"checkpoint={checkpoint!r}: has no tokenizer.json; put the tokenizer of"
      " the checkpoint next to its weights"
    )
  return LanguageModel(model.config, params, dtype, tokenizer, None, checkpoint)


LANGUAGE_MODELS = {"trained": Trained, "pretrained": Pretrained}


@dataclasses.dataclass(frozen=True)
class RecallAndText:
  """Two language models, and what they are asked.

  Attributes:
    recall, text: the models; may be one.
    probes: questions to the first.
    windows: held-out text for the second, ids `[texts, n]`.
    origin: where the weights come from, in words.
    others: weights of both from further seeds.
    name: of the text.
    more: further texts by name, as `windows`.
  """

  recall: LanguageModel
  text: LanguageModel
  probes: list[probes.Probe]
  windows: np.ndarray
  origin: str
  others: tuple[tuple[Any, Any], ...] = ()
  name: str = "text"
  more: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def model(self, name: str) -> LanguageModel:
    """The one called "recall" or "text"."""
    return self.text if name == "text" else self.recall

  @property
  def weights(self) -> tuple[tuple[Any, Any], ...]:
    """Of both, for every seed."""
    return ((self.recall.params, self.text.params), *self.others)


@dataclasses.dataclass(frozen=True)
class TrainedPair:
  """Two models trained here, or the finished runs in the workdir.

  Attributes:
    recall, text: configs of the runs.
    first: config of a shorter run that `recall` starts from: short contexts
      teach what belongs to what in far fewer steps. None: there is none.
    seeds: number of runs of each, with the config's seed and those after it.
      Recall and perplexity are their means.
  """

  recall: config_lib.Config
  text: config_lib.Config
  first: config_lib.Config | None = None
  seeds: int = 1

  def __post_init__(self):
    if self.seeds < 1:
      raise ValueError(f"seeds={self.seeds}: must be 1 or more")
    if not isinstance(self.recall.data, Recall):
      raise ValueError("recall: its data must be name='recall'")

  def prepare(
    self, workdir: pathlib.Path, grid: probes.Grid, texts: int, length: int
  ) -> RecallAndText:
    """Trains both unless that is done; `texts` windows of `length` tokens.

    Runs of the first seed are "recall" and "text" under `workdir`, those of
    others "recall_1", "text_1", ...
    """
    (recall, text), *others = [
      self._pair(workdir, seed) for seed in range(self.seeds)
    ]
    data = dataclasses.replace(self.text.data, length=length - 1, heldout=texts)
    return RecallAndText(
      recall,
      text,
      probes.of_recall(self.recall.data, grid),
      pipeline.heldout_arrays(data)["tokens"],
      f"models trained here for {self.recall.steps} and"
      f" {self.text.steps} steps"
      + (f", {self.seeds} seeds" if others else ""),
      tuple((recall.params, text.params) for recall, text in others),
    )

  def _pair(
    self, workdir: pathlib.Path, seed: int
  ) -> tuple[LanguageModel, LanguageModel]:
    """Both models of a seed, counted from 0."""

    def run(config: config_lib.Config, name: str) -> LanguageModel:
      seeded = dataclasses.replace(config, seed=config.seed + seed)
      return Trained(seeded).prepare(workdir, f"{name}{suffix}")

    suffix, recall = f"_{seed}" if seed else "", self.recall
    if self.first is not None:
      run(self.first, "recall_first")
      start = workdir / f"recall_first{suffix}"
      recall = dataclasses.replace(recall, init=str(start))
    return run(recall, "recall"), run(self.text, "text")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A published model; needles stand in the text it reads.

  Attributes:
    checkpoint, revision, precision: see `Pretrained`.
    data: a text, one of `experiments.data`; needles stand in it.
    more: further texts whose likelihood is measured.
  """

  checkpoint: str
  data: Annotated[Any, typed.OneOf(DATA)]
  revision: str | None = None
  precision: Literal["float32", "bfloat16"] = "float32"
  more: tuple[Annotated[Any, typed.OneOf(DATA)], ...] = ()

  def prepare(
    self, workdir: pathlib.Path, grid: probes.Grid, texts: int, length: int
  ) -> RecallAndText:
    """Reads the checkpoint and as much text as is needed."""
    made = Pretrained(self.checkpoint, self.revision, self.precision)
    lm = made.prepare(workdir)
    needed = max(texts * length, 4 * max(grid.lengths))
    corpus, windows = self._windows(lm, self.data, needed, texts, length)
    return RecallAndText(
      lm,
      lm,
      probes.of_text(lm.tokenizer, corpus, grid),
      windows,
      self.checkpoint,
      name=name_of(self.data),
      more={
        name_of(data): self._windows(lm, data, texts * length, texts, length)[1]
        for data in self.more
      },
    )

  def _windows(
    self, lm: LanguageModel, data: Any, needed: int, texts: int, length: int
  ) -> tuple[bytes, np.ndarray]:
    """About as much text as is needed, and windows of it."""
    # At most about eight bytes a token, in all tokenizers that are used.
    corpus = bytes(data.corpus("test")[: 8 * needed])
    ids = lm.tokenizer.encode(corpus.decode(errors="ignore"))
    if len(ids) < texts * length:
      raise DataError(
        f"data: has {len(ids)} tokens, {texts} texts of {length} are asked for"
      )
    return corpus, np.asarray(ids[: texts * length]).reshape(texts, length)


def name_of(data: Any) -> str:
  """The name of a data set in configs."""
  return next(name for name, kind in DATA.items() if kind is type(data))


SOURCES = {"trained_pair": TrainedPair, "checkpoint": Checkpoint}
