"""Class folders and labels: matched by name, refused with both lists."""

import pytest

from experiments.data import DATA, DataError
from experiments.data.labels import match
from tests.experiments.published_checkpoints import LABELS, write_images


@pytest.mark.parametrize(
  "names, expected",
  [
    (["tench", "Golden_Retriever"], (0, 2)),
    (["tinca-TINCA"], (0,)),
    (["tench, Tinca tinca"], (0,)),
    (["crane"], (1,)),
    (["bird"], (3,)),
    (["crane, bird", "golden  retriever"], (3, 2)),
    ([], ()),
  ],
)
def test_names_of_labels(names, expected):
  assert match(names, LABELS, "here") == expected


def test_names_that_differ_in_case_are_two_where_labels_are():
  assert match(["A", "a"], ["a", "A"], "here") == (1, 0)


@pytest.mark.parametrize(
  "names, labels, message",
  [
    (
      ["trout", "tench", "perch"], LABELS,
      "here: 2 of 3 class folders are no label: 'trout', 'perch'; the 4 labels"
      " are: 'tench, Tinca tinca', 'crane',",
    ),
    (
      [f"c{i}" for i in range(20)], [f"d{i}" for i in range(1000)],
      "'c7' and 12 more; the 1000 labels are: 'd0', .*'d7' and 992 more$",
    ),
    (["kite"], ["kite, toy", "kite, bird"], "may be 'kite, toy' .0. or 'kite,"),
    (["tench", "Tinca tinca"], LABELS, "'tench' and 'Tinca tinca' are both"),
    (["", "tench"], LABELS, "1 of 2 class folders are no label: ''"),
  ],
)  # fmt: skip
def test_what_does_not_match(names, labels, message):
  with pytest.raises(DataError, match=message):
    match(names, labels, "here")


def folder(path, **options):
  return DATA["folder_images"](path=str(path), size=8, **options)


def test_classes_are_counted(tmp_path):
  data = folder(write_images(tmp_path, ("b", "a", "c"), each=2))
  assert data.classes == ("a", "b", "c") and data.num_classes == 3
  assert len(data.source("train")) == 6


def test_a_test_folder_with_other_classes(tmp_path):
  data = folder(write_images(tmp_path, ("a", "b"), each=1))
  (tmp_path / "test" / "a").rename(tmp_path / "test" / "z")
  with pytest.raises(DataError, match="no label: 'z'; the 2 labels are: 'a'"):
    data.source("test")


def test_another_order_of_classes(tmp_path):
  data = folder(write_images(tmp_path, ("a", "b"), each=3), classes=("b", "a"))
  source = data.source("test")
  found = {(path.parent.name, label) for path, label in source.files}
  assert found == {("a", 1), ("b", 0)}


def test_class_folders_without_splits(tmp_path):
  write_images(tmp_path, ("a", "b"), each=2)
  data = folder(tmp_path / "train", test=".")
  assert data.classes == ("a", "b") and len(data.source("test")) == 4
  with pytest.raises(DataError, match="data.test=[.] to evaluate"):
    data.source("train")
  split = folder(tmp_path / "train", train=".", test=".", one_in=2)
  held, rest = (
    {p for p, _ in split.source(s).files} for s in ("test", "train")
  )
  assert len(held) == len(rest) == 2 and not held & rest
  assert {p.parent.name for p in held} == {"a", "b"}
  with pytest.raises(ValueError, match="one_in=1"):
    folder(tmp_path, one_in=1)
