"""Training, evaluation and sweeps. Run from a checkout; not installed."""

import importlib.util

if importlib.util.find_spec("ml_collections") is None:
  raise ImportError(
    "experiments need packages that tokjax does not: pip install -e"
    " '.[experiments]'"
  )
