"""The snippet of docs/vlm.md runs."""

import pathlib
import re

from tests.interop import test_llava
from tests.interop.language_references import transformers
from tokjax import interop

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "vlm.md"


def test_the_snippet_answers_prompts_with_images(tmp_path, monkeypatch):
  theirs = test_llava.make()
  theirs.save_pretrained(tmp_path / "llava-1.5-7b-hf")
  transformers.models.llava.LlavaImageProcessorPil(
    size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}
  ).save_pretrained(tmp_path / "llava-1.5-7b-hf")
  monkeypatch.chdir(tmp_path)
  found = re.search(
    r"<!-- snippet -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL
  )
  # The layers of the small model are fewer than those that FastV acts in.
  code = found[1].replace('"fastv"', 'recipes.get("fastv", layer=1)')
  names = {}
  exec(code.replace("capacity=1024", "capacity=32"), names)
  assert [len(text) for text in names["texts"]] == [32, 32, 32]
  plain, _, _ = interop.load("llava-1.5-7b-hf")
  assert names["generator"].image_tokens < 9
  assert plain.slots.name == "slots"
