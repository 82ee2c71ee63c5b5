"""Language models that generation and sweeps are run on.

A carrier is a decoder with weights and a tokenizer: a small one trained here
(once for each workdir), or a published checkpoint.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax

from experiments import train
from experiments.training import config as config_lib
from tokjax import interop
from tokjax.models import Decoder, DecoderConfig
from tokjax.reduce.reduction import Slots


@dataclasses.dataclass(frozen=True)
class Carrier:
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
      ValueError: the recipe learns something that is not among them.
    """
    example = jax.ShapeDtypeStruct((1, 2), "int32")
    wanted = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
    missing = sorted(
      {jax.tree_util.keystr(path) for path, _ in _leaves(wanted)}
      - {jax.tree_util.keystr(path) for path, _ in _leaves(self.params)}
    )
    if missing:
      raise ValueError(
        f"recipe {model.slots.name!r} learns {missing[0]} and"
        f" {len(missing) - 1} more, which these weights do not have; train with"
        " it first (config.recipe) and start from that run"
      )
    return self.params


def _leaves(tree):
  return jax.tree_util.tree_leaves_with_path(tree)


@dataclasses.dataclass(frozen=True)
class Trained:
  """A model trained here, or the finished run in the workdir.

  Attributes:
    train: config of the run.
  """

  train: config_lib.Config

  def prepare(self, workdir: pathlib.Path, name: str = "train") -> Carrier:
    """Trains under `workdir / name` unless that is done."""
    run = train.main(self.train, workdir / name)
    if not run.finished:
      raise SystemExit("training was interrupted; start again to go on")
    data = self.train.data
    texts = data.num_classes == 256
    return Carrier(
      self.train.model,
      jax.device_put(run.params, jax.devices()[0]),
      config_lib.DTYPES[self.train.precision],
      interop.Bytes() if texts else None,
      data,
      f"a model trained here for {self.train.steps} steps",
    )


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A published checkpoint.

  Attributes:
    checkpoint: folder or hub id, see `tokjax.interop.load`.
    revision: on the hub.
    precision: of activations, caches and parameters.
  """

  checkpoint: str
  revision: str | None = None
  precision: str = "float32"

  def prepare(self, workdir: pathlib.Path, name: str = "train") -> Carrier:
    """Reads it; nothing is written.

    Raises:
      ValueError: the folder has no tokenizer.json.
    """
    del workdir, name
    return _read(self.checkpoint, self.revision, self.precision)


@functools.lru_cache(maxsize=1)
def _read(checkpoint: str, revision: str | None, precision: str) -> Carrier:
  dtype = config_lib.DTYPES[precision]
  model, params, tokenizer = interop.load(
    checkpoint, dtype=dtype, param_dtype=dtype, revision=revision
  )
  if not isinstance(model, Decoder):
    raise ValueError(
      f"checkpoint={checkpoint!r}: is a {type(model).__name__}, no language"
      " model"
    )
  if tokenizer is None:
    raise ValueError(
      f"checkpoint={checkpoint!r}: has no tokenizer.json; put the tokenizer of"
      " the checkpoint beside its weights"
    )
  return Carrier(model.config, params, dtype, tokenizer, None, checkpoint)


CARRIERS = {"trained": Trained, "pretrained": Pretrained}
