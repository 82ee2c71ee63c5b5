"""Sizes of a dense model, from the shapes and constants of its ONNX graph.

Other activations, norms that differ and another head are refused; how a block
is put together is not looked at and taken to be DINOv2's.
"""

from collections.abc import Iterator

import numpy as np

from tokjax.interop.fields import Problems
from tokjax.interop.onnx_file import OnnxFile, attributes, module_of
from tokjax.interop.tensors import CheckpointError
from tokjax.models.vit import ViTConfig

ENCODER, HEAD = "backbone", "decoder"
EMBEDDINGS = f"{ENCODER}.embeddings"
POSITIONS = f"{EMBEDDINGS}.position_embeddings"
PATCH = f"{EMBEDDINGS}.patch_embeddings.projection"
BLOCK = f"{ENCODER}.encoder.layer"
# Modules of `transformers` 5, and the names under which tensors are published.
NEWER = {
  "attention.q_proj": "attention.attention.query",
  "attention.k_proj": "attention.attention.key",
  "attention.v_proj": "attention.attention.value",
  "attention.o_proj": "attention.output.dense",
}
# A transposed convolution that doubles the sides, as `Upsampler` has it.
DOUBLES = {"kernel_shape": [4, 4], "strides": [2, 2], "pads": [1, 1, 1, 1]}
PLAIN = {"dilations": [1, 1], "group": 1, "output_padding": [0, 0]}


def published(name: str) -> str:
  """The name of a tensor in checkpoints."""
  for newer, older in NEWER.items():
    name = name.replace(f".{newer}.", f".{older}.")
  return name


def read_encoder(file: OnnxFile, problems: Problems) -> ViTConfig:
  """The encoder, from shapes and constants of the graph."""
  for name in (f"{PATCH}.weight", f"{BLOCK}.0.mlp.fc1.weight"):
    if name not in file.headers:
      raise ValueError(
        f"{name}: is not there; DINOv2 encoders named {ENCODER!r} with a head"
        f" named {HEAD!r} are read"
      )
  width, channels, patch, _ = file.headers[f"{PATCH}.weight"].shape
  names = [name.removeprefix(f"{BLOCK}.") for name in file.headers]
  blocks = {n.split(".")[0] for n in names if n.split(".")[0].isdigit()}
  heads = heads_of(file, width)
  epsilons = set(_epsilons(file))
  for epsilon in sorted(epsilons)[1:]:
    problems.found.append(f"epsilon={epsilon}: must be that of the other norms")
  for i in range(len(blocks)):
    ops = [node.op_type for node in file.within(f"{BLOCK}.{i}")]
    for op in ("Softmax", "Erf"):
      if ops.count(op) != 1:
        problems.found.append(
          f"{BLOCK}.{i}: has {ops.count(op)} {op}, must have one"
        )
  return ViTConfig(
    image_size=image_sides(file),
    patch_size=patch,
    channels=channels,
    width=width,
    depth=len(blocks),
    heads=heads,
    mlp_dim=file.headers[f"{BLOCK}.0.mlp.fc1.weight"].shape[0],
    layer_scale=f"{BLOCK}.0.layer_scale1.lambda1" in file.headers,
    qkv_bias=f"{BLOCK}.0.attention.attention.query.bias" in file.headers,
    epsilon=min(epsilons, default=1e-6),
    pool="none",
    num_classes=None,
  )


def image_sides(file: OnnxFile) -> tuple[int, int]:
  """Height and width of the graph's images."""
  inputs = [i for i in file.graph.input if i.name not in file.headers]
  if len(inputs) != 1:
    raise ValueError(f"inputs {[i.name for i in inputs]}: must be one")
  axes = [axis.dim_value for axis in inputs[0].type.tensor_type.shape.dim]
  if len(axes) != 4 or min(axes[2:]) < 1:
    raise ValueError(
      f"{inputs[0].name} {axes}: must be [batch, channels, height, width] of a"
      " fixed height and width"
    )
  return axes[2], axes[3]


def heads_of(file: OnnxFile, width: int) -> int:
  """Heads of attention, from the last axis that queries are reshaped to."""
  query = f"{BLOCK}.0.attention.attention.query"
  shapes = [
    _last_axis(file, node.input[1])
    for made in file.within(f"{BLOCK}.0.attention")
    if made.op_type == "Add" and published(f"{module_of(made)}.") == f"{query}."
    for node in file.readers(made)
    if node.op_type == "Reshape"
  ]
  sizes = {size for size in shapes if size is not None}
  if len(sizes) != 1 or width % min(sizes):
    raise ValueError(
      f"{query}: is not reshaped to heads of a fixed size that divides {width}"
    )
  return width // min(sizes)


def _last_axis(file: OnnxFile, shape: str) -> int | None:
  """The last number of a shape that is put together in the graph."""
  node = file.producer(shape)
  if node is not None and node.op_type == "Concat":
    shape = node.input[-1]
  value = file.constant(shape)
  size = None if value is None else int(np.ravel(value)[-1])
  return size if size and size > 0 else None


def _epsilons(file: OnnxFile) -> Iterator[float]:
  """What the norms of the encoder add to the variance."""
  for node in file.nodes:
    if node.op_type == "LayerNormalization":
      yield round(attributes(node).get("epsilon", 1e-5), 12)
    if node.op_type == "Sqrt" and "norm" in node.name:
      added = file.producer(node.input[0])
      value = file.constant(added.input[1]) if added is not None else None
      if value is not None:
        # 1e-6 is stored as 9.99999997e-07.
        yield float(str(np.float32(value)))


def table_of(file: OnnxFile) -> np.ndarray:
  """The table of positions, its rows for the class token first, `[1, n, d]`.

  The exporter cuts it into constants where the graph interpolates it.
  """
  if POSITIONS in file.headers:
    return file.read([POSITIONS])[POSITIONS]
  parts = [
    file.constant(name)
    for node in file.within(EMBEDDINGS)
    for name in file.unnamed_inputs(node)
  ]
  parts = [part for part in parts if part is not None and part.ndim == 3]
  parts.sort(key=lambda part: part.shape[1])
  one = [part.shape[1] for part in parts][:1] == [1]
  if len(parts) != 2 or not one:
    shapes = [list(part.shape) for part in parts]
    raise CheckpointError(
      f"{file.path}: {POSITIONS} is in the pieces {shapes}; must be one row for"
      " the class token, and the other rows"
    )
  return np.concatenate(parts, axis=1)


def read_head(
  file: OnnxFile,
) -> tuple[tuple[int, ...], tuple[float, ...], int]:
  """Widths, epsilons of the batch norms and outputs of the head.

  Raises:
    ValueError: it computes something else than `Upsampler`, a bilinear resize
      to the image's size and a sigmoid.
  """
  skipped = (
    "Constant", "Unsqueeze", "Concat", "Shape", "Slice", "Cast", "Gather",
  )  # fmt: skip
  nodes = [n for n in file.within(HEAD) if n.op_type not in skipped]
  last = file.producer(file.graph.output[0].name)
  ops = [node.op_type for node in nodes]
  ups = [node for node in nodes if node.op_type == "ConvTranspose"]
  wanted = ["ConvTranspose", "BatchNormalization", "Relu"] * len(ups)
  wanted += ["Conv", "Resize"]
  if ops != wanted or last is None or last.op_type != "Sigmoid":
    raise ValueError(
      f"{HEAD}: computes {', '.join(ops) or 'nothing'}, and then"
      f" {last.op_type if last is not None else 'nothing'}; must be"
      " ConvTranspose, BatchNormalization and Relu, repeated, then Conv, Resize"
      " and a Sigmoid at the end"
    )
  for node in ups:
    found = {**PLAIN, **attributes(node)}
    for name, value in {**PLAIN, **DOUBLES}.items():
      if found.get(name) != value:
        raise ValueError(
          f"{node.name}: {name}={found.get(name)}, must be {value}"
        )
  resize = attributes(nodes[-1])
  modes = (resize.get("mode"), resize.get("coordinate_transformation_mode"))
  if modes != (b"linear", b"half_pixel"):
    raise ValueError(
      f"{nodes[-1].name}: mode {modes}, must be (b'linear', b'half_pixel')"
    )
  norms = [node for node in nodes if node.op_type == "BatchNormalization"]
  widths = [file.headers[node.input[1]].shape[1] for node in ups]
  epsilons = [attributes(node).get("epsilon", 1e-5) for node in norms]
  outputs = file.headers[f"{HEAD}.final_conv.weight"].shape[0]
  return tuple(widths), tuple(epsilons), outputs
