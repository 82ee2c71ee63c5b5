"""Grids of digits that are read aloud: a text of several tokens an image.

What each cell shows, in the order of reading: a digit, or "?" where its pixels
are scrambled. For methods of decoding, which a single word says nothing about.
"""

import dataclasses

import numpy as np

from experiments.data.grid_scenes import Element, GridScenes, Scene
from experiments.data.questions import NOTHING
from experiments.data.words import END, IMAGE, START

NO_DIGIT = "?"


@dataclasses.dataclass(frozen=True)
class GridCaptions(GridScenes):
  """Images of digits that are read aloud, another one at every turn.

  Attributes: see `GridScenes`.
  """

  @property
  def length(self) -> int:
    """Ids of an example: start, image, a word a cell, end."""
    return 3 + self.side**2

  def augment(self, element: Element, rng: np.random.Generator) -> Element:
    """Another image at every turn."""
    return self._read(self.scene(element["split"], rng))

  def prepare(self, element: Element) -> Element:
    """A held-out image."""
    return self._read(self._heldout(element["number"]))

  def caption(self, number: int) -> tuple[np.ndarray, list[int]]:
    """A held-out image and the ids of its caption."""
    scene = self._heldout(number)
    return scene.image, self._ids(scene)

  def _heldout(self, number: int) -> Scene:
    return self.scene("test", self.heldout_rng(number))

  def _ids(self, scene: Scene) -> list[int]:
    said = (NO_DIGIT if x < 0 else str(x) for x in scene.label.ravel())
    return self.words.encode(" ".join(said))[1:]

  def _read(self, scene: Scene) -> Element:
    ids = [START, IMAGE, *self._ids(scene), END]
    return {
      "image": scene.image.astype(np.float32),
      "tokens": np.array(ids, np.int32),
      "target": np.array([NOTHING, *ids[2:], NOTHING], np.int32),
      "length": np.int32(len(ids)),
    }
