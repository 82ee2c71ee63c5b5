"""A run as a published checkpoint, in the layout of Hugging Face.

python -m experiments.export --workdir RUN --out FOLDER
python -m experiments.export --workdir RUN --out FOLDER --push OWNER/NAME

Writes config.json and safetensors that `transformers` (or timm) and
`tokjax.interop.load` read; preprocessor and tokenizer files of the checkpoint
that the run started from; and, if a recipe was trained with, `tokjax.json` and
`tokjax.safetensors`, from which `interop.load(FOLDER, slots=...)` takes the
parameters that the recipe added:

  name, options = interop.recipe_of(FOLDER)
  slots = recipes.get(name, **options)
  model, params, inputs = interop.load(FOLDER, slots=slots)

FOLDER appears when it is complete.
"""

import os
import pathlib
import shutil
import tempfile
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
from huggingface_hub import utils

from experiments import launch, sources
from experiments.command import Command, Option
from experiments.data.images import Images
from experiments.evaluate import restore_run
from experiments.training import config as config_lib
from experiments.training import mesh as mesh_lib
from experiments.training import published
from experiments.training.errors import WorkdirError, first_line
from tokjax import interop
from tokjax.interop import files, preprocessing_files
from tokjax.models import ViTConfig

DTYPES = {**config_lib.DTYPES, "float16": jnp.float16}
# What belongs to a tokenizer, whichever of them a checkpoint has.
TOKENIZER = (
  "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
  "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
  "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
# Entries of config.json that say nothing of the architecture.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def main(
  workdir: str | pathlib.Path,
  out: str | pathlib.Path,
  *,
  source: str | None = None,
  layout: str | None = None,
  dtype: str | None = None,
  push: str | None = None,
  private: bool = False,
) -> pathlib.Path:
  """Exports the last checkpoint of a run: averaged parameters if it has any.

  Args:
    workdir: of the run.
    out: folder to write; it may exist if it is empty.
    source: checkpoint whose preprocessor and tokenizer files are copied; None:
      the one that the run, or the run that it started from, started from.
    layout: see `interop.save`; None: that of `source` if it can hold the
      model, else the first that can.
    dtype: of the tensors, one of `DTYPES`; None: float32, as trained.
    push: name on the hub, `owner/name`, that is made and uploaded to.
    private: it is made for its owner only.

  Returns:
    The folder.

  Raises:
    WorkdirError: `out` is a file, or a folder that is not empty.
    CheckpointError: the run has no checkpoint, or it cannot be read.
    ValueError: no layout can hold the model; or a name that the hub does not
      take.
    OSError: the hub did not take the folder, which stays here.
  """
  out = free_folder(out)
  if push is not None:
    utils.validate_repo_id(push)
  if dtype is not None and dtype not in DTYPES:
    raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
  config, params, step = restore_run(workdir, mesh_lib.Mesh().build())
  if source is None:
    source = sources.source_of(config)
  folder = None if source is None else published.locate(source)
  params = jax.device_get(params)
  out.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
    prefix=f".{out.name}.", dir=out.parent
  ) as made:
    part = pathlib.Path(made) / out.name
    write(part, config, params, folder, layout, dtype and DTYPES[dtype])
    os.replace(part, out)
  if push is not None:
    upload(out, push, private, f"step {step} of a run of tokjax")
  return out


def write(
  part: pathlib.Path,
  config: config_lib.Config,
  params: Any,
  source: pathlib.Path | None,
  layout: str | None,
  dtype: Any,
) -> None:
  """All files of the checkpoint, into a new folder."""
  model, data, recipe = config.model, config.data, None
  if config.recipe.name != "none":
    _, options = config.recipe.call()
    recipe = (config.recipe.name, options)
  if layout is None and source is not None:
    layout = interop.layout_for(model, source)
  how = data.as_preprocessing() if isinstance(data, Images) else None
  interop.save(
    part,
    model,
    params,
    layout=layout,
    preprocessing=how,
    labels=sources.labels(config, source),
    recipe=recipe,
    dtype=dtype,
  )
  if source is None or not source.is_dir():
    return
  if isinstance(model, ViTConfig):
    # As it was published, where it says the same.
    same = how is not None and interop.inputs_of(source) == how
    copied = [preprocessing_files.HF_FILE] if same else []
    copied = [name for name in copied if (part / name).exists()]
  else:
    copied = list(TOKENIZER)
    keep_tokens(part / "config.json", source / "config.json")
  for name in copied:
    if (source / name).exists():
      shutil.copyfile(files.regular(source / name), part / name)


def keep_tokens(path: pathlib.Path, source: pathlib.Path) -> None:
  """Adds the ids of special tokens, which a run does not know."""
  whole, theirs = files.read_json(path), files.read_json(source)
  known = {name: theirs[name] for name in TOKENS if name in theirs}
  files.write_json(path, {**whole, **known})


def free_folder(out: str | pathlib.Path) -> pathlib.Path:
  """The folder to write, absent or empty.

  Raises:
    WorkdirError: it is neither.
  """
  if not str(out):
    raise WorkdirError("out='': must name a folder")
  path = pathlib.Path(out).absolute()
  if path.exists() and not path.is_dir():
    raise WorkdirError(f"out={str(out)!r}: is a file; it must be a new folder")
  if path.is_dir() and any(path.iterdir()):
    raise WorkdirError(
      f"out={str(out)!r}: is not empty; take a new folder, or remove this one"
    )
  return path


def upload(
  folder: pathlib.Path, name: str, private: bool, message: str
) -> None:
  """Makes a model on the hub, unless it is there, and uploads the folder.

  Raises:
    OSError: it was not uploaded; says why.
  """
  api = huggingface_hub.HfApi()
  try:
    api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(
      repo_id=name, folder_path=str(folder), commit_message=message
    )
  except Exception as error:  # The library passes on errors of its transport.
    raise OSError(
      f"push={name!r}: the hub did not take it ({first_line(error)}); the"
      f" checkpoint is in {folder}"
    ) from error


def from_command_line(given: Any) -> None:
  """`main` with the options of the command; prints the folder."""
  out = main(
    given.workdir,
    given.out,
    source=given.source,
    layout=given.layout,
    dtype=given.dtype,
    push=given.push,
    private=given.private,
  )
  print(out)


COMMAND = Command(
  __doc__ or "",
  (
    launch.workdir(),
    Option("out", str, None, "New folder to write.", True),
    Option("source", str, None, "Checkpoint whose files are copied."),
    Option("layout", str, None, "Class of `transformers`, or timm."),
    Option("dtype", str, None, "Of the tensors, such as bfloat16."),
    Option("push", str, None, "Upload to the hub: OWNER/NAME."),
    Option("private", bool, False, "Only its owner sees it on the hub."),
    Option("traceback", bool, False, "Show where an error comes from."),
  ),
)

if __name__ == "__main__":
  launch.start(COMMAND, from_command_line)
