"""`merges.png`: which patches became one token, for many methods at once."""

import concurrent.futures
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sweeps.classifiers import Classifier
from experiments.sweeps.subject import Job
from tokjax.analysis import gallery, merge_map


def draw(
  classifier: Classifier,
  jobs: Sequence[Job],
  count: int,
  threads: int,
  path: pathlib.Path,
) -> None:
  """A row for each job that the model can be built with, a column an image.

  Args:
    jobs: recipes at one keep ratio.
    count: number of images.
    threads: that compile.
    path: the PNG written.
  """
  images = jnp.asarray(classifier.images(count))

  def one(job: Job) -> merge_map.Groups | None:
    try:
      model = classifier.build(job.slots())
    except ValueError:  # a row of the results says why
      return None
    key, params = jax.random.key(0), classifier.params
    return merge_map.look(model, params, images, key, every=False)[-1]

  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    found = zip(jobs, pool.map(one, jobs), strict=True)
  maps = {job.method: groups for job, groups in found if groups is not None}
  shown = merge_map.displayable(np.asarray(images))
  keep = ", ".join(f"{k:.0%}" for k in dict.fromkeys(job.keep for job in jobs))
  gallery.draw_methods(
    shown, maps, path,
    title=f"Where the patches went; {keep} of the tokens remain",
  )  # fmt: skip
