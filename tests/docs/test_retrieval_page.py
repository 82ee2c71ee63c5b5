"""The snippets of docs/retrieval.md run, one after the other."""

import pathlib
import re

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "retrieval.md"


def test_the_snippets_run():
  names = {}
  for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
    exec(code, names)
  assert int(names["found"].document[0]) == 2  # Its tokens are the query's.
  assert names["short"].shape == (1, 2 * 16 + 8)
  assert names["length"].tolist() == [2 * 16 + 8]
  assert names["read"].read.max() <= 8
  assert names["logits"].shape == (4, 300, 16)
  assert names["cells"].shape == (4, 2, 8)
