"""Which tokens belong together: from features `[n, d]` to a plan.

Matchers say who joins whom; the returned plan sums its members until a
combiner weights it (`plan.weighted(size)`, `plan.pruned()`). All are pure,
work on one example and are lifted with `jax.vmap`. `mask` excludes padded
tokens; `count` (traced) is how many outputs this example is entitled to when
its padded batch has room for more.
"""

from tokjax.matching.bipartite import Sides
from tokjax.matching.bipartite import at_random
from tokjax.matching.bipartite import best_edges
from tokjax.matching.bipartite import bidirectional
from tokjax.matching.bipartite import bipartite
from tokjax.matching.bipartite import every_kth
from tokjax.matching.bipartite import grid_cells
from tokjax.matching.bipartite import parity
from tokjax.matching.bipartite import split
from tokjax.matching.clustering import agglomerative
from tokjax.matching.clustering import dpc_knn
from tokjax.matching.clustering import kmedoids
from tokjax.matching.soft import cells_of
from tokjax.matching.soft import grid_pool
from tokjax.matching.soft import local_soft_kmeans
from tokjax.matching.soft import nearest_mix
from tokjax.matching.soft import soft_assignment

__all__ = [
  "Sides",
  "agglomerative",
  "at_random",
  "best_edges",
  "bidirectional",
  "bipartite",
  "cells_of",
  "dpc_knn",
  "every_kth",
  "grid_cells",
  "grid_pool",
  "kmedoids",
  "local_soft_kmeans",
  "nearest_mix",
  "parity",
  "soft_assignment",
  "split",
]
