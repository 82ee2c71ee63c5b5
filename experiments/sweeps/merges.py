"""`merges.png`: which patches became one token, for many methods at once."""

import concurrent.futures
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sweeps.classification import Subject
from experiments.sweeps.programs import Job
from tokjax.analysis import gallery, merge_map
from tokjax.budgets import BudgetError


def draw(
  subject: Subject,
  methods: Sequence[str],
  keep: float,
  count: int,
  threads: int,
  path: pathlib.Path,
) -> None:
  """A row for each method that reaches `keep`, a column for each image."""
  images = jnp.asarray(subject.images(count))

  def one(method: str) -> merge_map.Groups | None:
    try:
      model = subject.build(Job(method, keep).slots())
    except BudgetError:
      return None
    key = jax.random.key(0)
    return merge_map.look(model, subject.params, images, key, every=False)[-1]

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    found = list(pool.map(one, methods))
  maps = {m: g for m, g in zip(methods, found, strict=True) if g is not None}
  shown = merge_map.displayable(np.asarray(images))
  gallery.draw_methods(
    shown, maps, path,
    title=f"Where the patches went; {keep:.0%} of the tokens remain",
  )  # fmt: skip
