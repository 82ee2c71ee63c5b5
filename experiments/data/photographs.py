"""Parts of photographs that installed packages carry, or of a folder's."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image, ImageOps

from experiments.data.images import SUFFIXES

# Sides of the parts, as shares of the shorter side, and how many of each along
# an axis that has room.
PARTS = ((1.0, 2), (0.6, 2))


def packaged() -> dict[str, Image.Image]:
  """Photographs by name: two of scikit-learn and one of matplotlib."""
  from matplotlib import cbook
  from sklearn import datasets

  found = datasets.load_sample_images()
  out = {
    pathlib.Path(name).stem: Image.fromarray(image)
    for name, image in zip(found.filenames, found.images, strict=True)
  }
  path = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
  return out | in_files([path])


def in_files(paths: Sequence[str | pathlib.Path]) -> dict[str, Image.Image]:
  """Images by the names of their files.

  Raises:
    ValueError: a file that is no image.
  """
  out = {}
  for path in map(pathlib.Path, paths):
    try:
      with Image.open(path) as image:
        out[path.stem] = ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
      raise ValueError(f"{path}: is no image that can be read") from error
  return out


def in_folder(folder: str | pathlib.Path) -> dict[str, Image.Image]:
  """The images directly in a folder, in the order of their names.

  Raises:
    FileNotFoundError: there is no such folder, or no image in it.
    ValueError: a file that is no image.
  """
  folder = pathlib.Path(folder).expanduser()
  if not folder.is_dir():
    raise FileNotFoundError(f"folder={str(folder)!r}: is no folder")
  paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
  if not paths:
    raise FileNotFoundError(
      f"folder={str(folder)!r}: has no image ({', '.join(SUFFIXES)})"
    )
  return in_files(paths)


def parts(
  image: Image.Image, mirrored: bool = True
) -> Iterator[Image.Image]:
  """Squares of an image: the largest ones and smaller ones.

  They overlap, so that they are not independent.

  Args:
    image: of any size.
    mirrored: each of them comes a second time, left and right exchanged.
  """
  width, height = image.size
  for share, count in PARTS:
    side = round(min(width, height) * share)
    for top in corners(height - side, count):
      for left in corners(width - side, count):
        part = image.crop((left, top, left + side, top + side))
        yield part
        if mirrored:
          yield part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def corners(room: int, count: int) -> list[int]:
  """Places at equal distances, both ends among them; one where no room is."""
  if room < 1:
    return [0]
  return [round(i * room / (count - 1)) for i in range(count)]


def parts_of_all(
  images: Mapping[str, Image.Image], mirrored: bool = True
) -> list[Image.Image]:
  """The parts of every image in turn: the largest of each stand first."""
  each = [list(parts(image, mirrored)) for image in images.values()]
  most = max(map(len, each))
  return [found[i] for i in range(most) for found in each if i < len(found)]
