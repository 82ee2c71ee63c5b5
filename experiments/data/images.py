"""Image classification: any builder of tensorflow-datasets, or a folder."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from experiments.data import tfds_source
from experiments.data.crops import centre, pad_crop, random_resized_crop
from experiments.data.errors import DataError
from experiments.data.labels import listed, match
from experiments.data.randaugment import rand_augment
from tokjax.interop import Preprocessing
from tokjax.interop.images import to_pillow
from tokjax.interop.preprocessing import fraction

Element = dict[str, Any]
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class Images:
  """Augmentation and evaluation of images; sources are subclasses.

  Attributes:
    size: height and width that the model gets.
    num_classes: of the labels.
    crop: training crops: "resized" (random area and ratio), "pad" (random
      shift after padding; small images), "none" (as in evaluation).
    min_area: smallest share of the image's area in a "resized" crop.
    pad: pixels of padding of a "pad" crop.
    flip: mirror half of the training images.
    layers, magnitude: of RandAugment; 0 layers: none.
    eval_zoom: images are scaled to size * eval_zoom before the centre crop.
    mean, std: of the values in [0, 1], per channel.
    heldout: at most so many images are evaluated; None: all.
    preprocessing: of a published checkpoint, which evaluates images instead of
      `size`, `eval_zoom`, `mean` and `std`; None: these.
  """

  size: int = 224
  num_classes: int = 1000
  crop: Literal["resized", "pad", "none"] = "resized"
  min_area: float = 0.08
  pad: int = 4
  flip: bool = True
  layers: int = 2
  magnitude: float = 9.0
  eval_zoom: float = 256 / 224
  mean: tuple[float, ...] = (0.485, 0.456, 0.406)
  std: tuple[float, ...] = (0.229, 0.224, 0.225)
  heldout: int | None = None
  preprocessing: Preprocessing | None = None

  def __post_init__(self):
    if not 0 < self.min_area <= 1:
      raise ValueError(f"min_area={self.min_area}: must be in (0, 1]")
    if not 0 <= self.magnitude <= 10:
      raise ValueError(f"magnitude={self.magnitude}: must be in [0, 10]")
    if self.eval_zoom < 1:
      raise ValueError(f"eval_zoom={self.eval_zoom}: must be 1 or more")

  def source(self, split: str) -> Sequence[Element]:
    """Raw examples: "image" (Pillow image or array) and "label"."""
    raise NotImplementedError

  def for_checkpoint(
    self, how: Preprocessing | None, labels: Sequence[str] = ()
  ) -> "Images":
    """The same images, prepared as a published checkpoint expects them.

    Args:
      how: its preprocessing; None: it states none, and that of the data stays.
      labels: names of its classes; (): those of the data stay.

    Raises:
      ValueError: a shape of images that training crops do not have.
    """
    del labels
    if how is None:
      return self
    if how.sides[0] != how.sides[1] or len(how.mean) != 3:
      raise ValueError(
        f"preprocessing of {how.sides[0]}x{how.sides[1]} pixels in"
        f" {len(how.mean)} channels: training takes square images in colour"
      )
    return dataclasses.replace(
      self, size=how.sides[0], mean=how.mean, std=how.std, preprocessing=how
    )

  def as_preprocessing(self) -> Preprocessing:
    """How images are evaluated, as a published checkpoint says it.

    `Preprocessing` scales before it crops, where the data sets here crop
    before they scale: pixels near the border may differ slightly.
    """
    if self.preprocessing is not None:
      return self.preprocessing
    share = fraction(self.size, round(self.size * self.eval_zoom))
    return Preprocessing(
      self.mean, self.std, self.size, "bicubic", crop_fraction=share
    )

  def augment(self, element: Element, rng: np.random.Generator) -> Element:
    """A training example: cropped, flipped, augmented, normalised."""
    image = to_image(element["image"])
    if self.crop == "resized":
      image = random_resized_crop(image, self.size, self.min_area, rng)
    elif self.crop == "pad":
      image = pad_crop(centre(image, self.size, 1.0), self.pad, rng)
    else:
      image = centre(image, self.size, self.eval_zoom)
    if self.flip and rng.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = rand_augment(image, self.layers, self.magnitude, rng)
    return self._finish(image, element)

  def prepare(self, element: Element) -> Element:
    """An example as it is evaluated: centre crop, normalised."""
    if self.preprocessing is not None:
      values = self.preprocessing(to_image(element["image"]))
      return {"image": values, "label": np.int32(element["label"])}
    image = centre(to_image(element["image"]), self.size, self.eval_zoom)
    return self._finish(image, element)

  def _finish(self, image: Image.Image, element: Element) -> Element:
    values = np.asarray(image, np.float32) / 255.0
    mean, std = np.float32(self.mean), np.float32(self.std)
    label = np.int32(element["label"])
    return {"image": (values - mean) / std, "label": label}


@dataclasses.dataclass(frozen=True)
class TfdsImages(Images):
  """Any image-classification builder of tensorflow-datasets, by name.

  Attributes:
    builder: "cifar10", "imagenet2012", ...
    train, test: splits, with slices if wanted ("train[:1%]").
    data_dir: where it was prepared; None: tfds's own default.
    image_key, label_key: its features.
  """

  builder: str = "imagenet2012"
  train: str = "train"
  test: str = "validation"
  data_dir: str | None = None
  image_key: str = "image"
  label_key: str = "label"

  def source(self, split: str) -> Sequence[Element]:
    keys = {"image": self.image_key, "label": self.label_key}
    wanted = {"train": self.train, "test": self.test}[split]
    limit = self.heldout if split == "test" else None
    return tfds_source.load(
      self.builder, wanted, self.data_dir, tuple(keys.items()), limit
    )


@dataclasses.dataclass(frozen=True)
class FolderImages(Images):
  """A folder for each class: `path/train/CLASS/*.jpg`, `path/test/CLASS/*.jpg`.

  Attributes:
    path: the folder.
    train, test: names of the sub-folders; "." is `path` itself. Where both are
      the same folder, one in `one_in` images of each class is held out.
    one_in: see `test`; at least 2.
    num_classes: of the labels; 0: as many as there are class folders.
    classes: names of the labels, in their order, which class folders are
      matched with (`experiments.data.labels`); (): the class folders, sorted.
    match: with the labels of a checkpoint: "name"; or "order", for folders that
      are as many as its labels and, sorted, in their order, such as the ids of
      WordNet that ImageNet's folders have as names.
  """

  path: str = "images"
  train: str = "train"
  test: str = "test"
  one_in: int = 5
  num_classes: int = 0
  classes: tuple[str, ...] = ()
  match: Literal["name", "order"] = "name"

  def __post_init__(self):
    super().__post_init__()
    if self.one_in < 2:
      raise ValueError(f"one_in={self.one_in}: must be 2 or more")
    if not self.classes:
      splits = [self._folder(split) for split in ("train", "test")]
      found = next(filter(None, map(_names, splits)), ())
      object.__setattr__(self, "classes", found)
    if not self.num_classes:
      object.__setattr__(self, "num_classes", len(self.classes))

  def source(self, split: str) -> Sequence[Element]:
    folder = self._folder(split)
    files = _files(folder, self.classes, self.num_classes, *self._part(split))
    return Files(files if split == "train" else files[: self.heldout])

  def for_checkpoint(
    self, how: Preprocessing | None, labels: Sequence[str] = ()
  ) -> "Images":
    """See `Images.for_checkpoint`; class folders are matched with the labels.

    Raises:
      DataError: a class folder is no label; shows both lists.
    """
    made = super().for_checkpoint(how)
    if not labels:
      return made
    if self.match == "order":
      if len(self.classes) != len(labels):
        raise DataError(
          f"{self.path}: match='order' needs as many class folders as labels;"
          f" the {len(self.classes)} folders are: {listed(self.classes)}; the"
          f" {len(labels)} labels are: {listed(labels)}"
        )
      return made
    for split in ("train", "test"):
      names = _names(self._folder(split))
      match(names, labels, str(self._folder(split)))
    return dataclasses.replace(
      made, classes=tuple(labels), num_classes=len(labels)
    )

  def _part(self, split: str) -> tuple[int, bool]:
    """One in how many images is held out (0: none), and whether it is meant."""
    one_folder = self._folder("train") == self._folder("test")
    return self.one_in if one_folder else 0, split == "test"

  def _folder(self, split: str) -> pathlib.Path:
    name = self.train if split == "train" else self.test
    return pathlib.Path(self.path) / name


@dataclasses.dataclass(frozen=True)
class Files:
  """Image files by index."""

  files: tuple[tuple[pathlib.Path, int], ...]

  def __len__(self) -> int:
    return len(self.files)

  def __getitem__(self, index: int) -> Element:
    path, label = self.files[index]
    try:
      with Image.open(path) as image:
        image.load()
      image = to_image(image)
    except OSError as error:
      raise DataError(f"{path}: is no readable image ({error})") from error
    except DataError as error:
      raise DataError(f"{path}: {error}") from error
    return {"image": image, "label": label}


def _names(folder: pathlib.Path) -> tuple[str, ...]:
  """Names of the class folders, sorted; (): there is no such folder."""
  if not folder.is_dir():
    return ()
  found = (p for p in folder.iterdir() if p.is_dir())
  return tuple(sorted(p.name for p in found if not p.name.startswith(".")))


@functools.cache
def _files(
  folder: pathlib.Path,
  classes: tuple[str, ...],
  num_classes: int,
  one_in: int,
  held_out: bool,
) -> tuple[tuple[pathlib.Path, int], ...]:
  """Shuffled files of a split, with their labels; see `FolderImages._part`."""
  if not folder.is_dir():
    raise DataError(
      f"{folder}: no such folder; expected {folder}/CLASS/*.jpg, one folder for"
      " each class (class folders directly in data.path: data.test=. to"
      " evaluate, data.train=. too to train)"
    )
  names = _names(folder)
  if len(classes) != num_classes:
    what = f"has {len(names)} class folders"
    if len(names) != len(classes):
      what = f"data.classes has {len(classes)} names"
    raise DataError(f"{folder}: {what}; data.num_classes is {num_classes}")
  found = []
  labels = match(names, classes, str(folder))
  for name, label in zip(names, labels, strict=True):
    every = (folder / name).rglob("*")
    images = sorted(p for p in every if p.suffix.lower() in SUFFIXES)
    if one_in:
      images = [
        p for i, p in enumerate(images) if (i % one_in == 0) == held_out
      ]
    found += [(path, label) for path in images]
  if not found:
    raise DataError(f"{folder}: holds no images ({', '.join(SUFFIXES)})")
  order = np.random.default_rng(0).permutation(len(found))
  return tuple(found[i] for i in order)


def to_image(value: Any) -> Image.Image:
  """An upright, opaque 8-bit RGB image, see `tokjax.interop.images.to_pillow`.

  Args:
    value: of Pillow, or an array `[h, w]` or `[h, w, c]` of uint8 or uint16.

  Raises:
    DataError: another mode, dtype or shape.
  """
  try:
    return to_pillow(value)
  except ValueError as error:
    raise DataError(str(error)) from error
