"""Data sets by name, and the pipeline that feeds the loop from any of them."""

from experiments.data.digit_grid import DigitGrid
from experiments.data.digits import Digits
from experiments.data.easy_vqa import EasyVqa
from experiments.data.errors import DataError
from experiments.data.grid_captions import GridCaptions
from experiments.data.grid_questions import GridQuestions
from experiments.data.images import FolderImages, TfdsImages
from experiments.data.recall import Recall
from experiments.data.text import (
  FolderText,
  LanguageReference,
  StandardLibrary,
  TfdsText,
)

DATA = {
  "digits": Digits,
  "digit_grid": DigitGrid,
  "grid_captions": GridCaptions,
  "grid_questions": GridQuestions,
  "easy_vqa": EasyVqa,
  "tfds_images": TfdsImages,
  "folder_images": FolderImages,
  "standard_library": StandardLibrary,
  "language_reference": LanguageReference,
  "tfds_text": TfdsText,
  "folder_text": FolderText,
  "recall": Recall,
}

__all__ = ["DATA", "DataError"]
