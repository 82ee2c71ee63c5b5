"""ONNX graphs as PyTorch's exporter writes them: tensors by their old names.

The `onnx` package (`pip install "tokjax[onnx]"`) reads the protobuf; values are
numbers in the file itself, never pickled, and files that point to other files
are refused. The exporter folds constants: a linear layer's weight is transposed
and loses its name. It is found again by the name of its node, which is the path
of the module.
"""

import functools
import importlib
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tokjax.interop import files
from tokjax.interop.tensors import CheckpointError, Header

# onnx.TensorProto.DataType.
DTYPES = {1: np.float32, 10: np.float16, 11: np.float64, 16: jnp.bfloat16}
EXTERNAL = 1
# Names that the exporter makes up.
UNNAMED = "onnx::"


def library() -> Any:
  """The `onnx` package.

  Raises:
    ImportError: it is not installed; says how to.
  """
  try:
    return importlib.import_module("onnx")
  except ImportError as error:
    raise ImportError(
      "ONNX files need the package onnx: pip install 'tokjax[onnx]'"
    ) from error


class OnnxFile:
  """The graph of a file.

  Attributes:
    path: of the file.
    nodes: in the order in which they are computed.
    headers: shape and dtype of every tensor, by the name that it has in the
      exported module (see `rename`); weights of linear layers are `[out, in]`.
  """

  def __init__(
    self, path: pathlib.Path, rename: Callable[[str], str] = lambda name: name
  ):
    """Reads the file.

    Args:
      path: of the file.
      rename: gives tensors the names under which they are published.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: no ONNX file, or one that is damaged or in parts.
      ImportError: the package `onnx` is not installed.
    """
    self.path = files.regular(path.expanduser().resolve())
    onnx = library()
    try:
      model = onnx.load(str(self.path), load_external_data=False)
      self._tensors = {t.name: t for t in model.graph.initializer}
      for tensor in self._tensors.values():
        _check(tensor)
    except Exception as error:
      # protobuf raises an error of its own, whose module differs.
      if not isinstance(error, ValueError | OSError) and (
        type(error).__name__ != "DecodeError"
      ):
        raise
      raise CheckpointError(
        f"{self.path}: {self.path.stat().st_size} bytes, truncated, damaged or"
        f" no ONNX file ({error}); download or write this file again"
      ) from error
    self.graph = model.graph
    self.nodes: Sequence[Any] = tuple(model.graph.node)
    if not self.nodes:
      raise CheckpointError(f"{self.path}: holds no graph")
    self._named = {rename(k): v for k, v in self._names().items()}
    self.headers: Mapping[str, Header] = {
      name: _header(self._tensors[stored], turned)
      for name, (stored, turned) in self._named.items()
    }

  def _names(self) -> dict[str, tuple[str, bool]]:
    """Stored name of every tensor and whether it is turned, by module name."""
    found = {n: (n, False) for n in self._tensors if not n.startswith(UNNAMED)}
    for node in self.nodes:
      if node.op_type != "MatMul" or node.input[1] not in self._tensors:
        continue
      if node.input[1].startswith(UNNAMED):
        found[f"{module_of(node)}.weight"] = (node.input[1], True)
    return found

  def read(self, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named tensors."""
    found = {}
    for name in names:
      stored, turned = self._named[name]
      value = _values(self._tensors[stored])
      found[name] = value.T if turned else value
    return found

  def constant(self, name: str) -> np.ndarray | None:
    """A value in the graph, by its stored name; None: it is computed."""
    tensor = self._tensors.get(name)
    if tensor is None:
      node = self.producer(name)
      if node is None or node.op_type != "Constant":
        return None
      tensor = attributes(node).get("value")
    return None if tensor is None else _values(tensor)

  def unnamed_inputs(self, node: Any) -> list[str]:
    """Stored names of a node's tensors that lost their own."""
    return [
      name
      for name in node.input
      if name in self._tensors and name.startswith(UNNAMED)
    ]

  @functools.cached_property
  def _producers(self) -> dict[str, Any]:
    return {name: node for node in self.nodes for name in node.output}

  def producer(self, name: str) -> Any:
    """The node that computes a value; None: it is an input or a tensor."""
    return self._producers.get(name)

  def readers(self, node: Any) -> Iterator[Any]:
    """The nodes that read what a node computes."""
    made = set(node.output)
    return (n for n in self.nodes if made.intersection(n.input))

  def within(self, module: str) -> Iterator[Any]:
    """The nodes of a module, those of its parts included."""
    prefix = f"/{module.replace('.', '/')}/"
    return (n for n in self.nodes if path_of(n).startswith(prefix))


def path_of(node: Any) -> str:
  """A node's name, its modules separated by slashes only."""
  return node.name.replace(".", "/")


def module_of(node: Any) -> str:
  """The module that a node is of, as PyTorch names it."""
  return ".".join(node.name.split("/")[1:-1])


def attributes(node: Any) -> dict[str, Any]:
  """Values of a node's attributes; tensors as they are stored."""
  get = library().helper.get_attribute_value
  return {attribute.name: get(attribute) for attribute in node.attribute}


def _check(tensor: Any) -> None:
  """Raises ValueError where a tensor's values are not all in the file."""
  if tensor.data_location == EXTERNAL:
    raise ValueError(f"{tensor.name} is in another file, which is not read")
  if any(n < 0 for n in tensor.dims):
    raise ValueError(f"{tensor.name} has axes {list(tensor.dims)}")
  if tensor.data_type not in DTYPES or not tensor.HasField("raw_data"):
    return
  wanted = math.prod(tensor.dims) * np.dtype(DTYPES[tensor.data_type]).itemsize
  if len(tensor.raw_data) != wanted:
    raise ValueError(
      f"{tensor.name} {list(tensor.dims)} has {len(tensor.raw_data)} bytes of"
      f" {wanted}"
    )


def _header(tensor: Any, turned: bool) -> Header:
  shape = tuple(tensor.dims)
  dtype = DTYPES.get(tensor.data_type)
  name = f"type {tensor.data_type}" if dtype is None else np.dtype(dtype).name
  return Header(shape[::-1] if turned else shape, name)


def _values(tensor: Any) -> np.ndarray:
  dtype = DTYPES.get(tensor.data_type)
  if dtype is not None and tensor.HasField("raw_data"):
    return np.frombuffer(tensor.raw_data, dtype).reshape(tuple(tensor.dims))
  return library().numpy_helper.to_array(tensor)
