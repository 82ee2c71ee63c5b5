"""What makes the inputs of a model that takes images and text."""

import dataclasses

from tokjax.interop.preprocessing import Preprocessing
from tokjax.interop.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ImagesAndText:
  """A tokenizer and the preprocessing of images.

  Attributes:
    tokenizer: None if the folder has none.
    preprocessing: None if the folder does not state it.
  """

  tokenizer: Tokenizer | None
  preprocessing: Preprocessing | None
