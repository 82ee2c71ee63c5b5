"""Training, evaluation and sweeps, as `python -m experiments.NAME`.

The wheel holds this package in `tokjax/shipped`, for the command `tokjax`;
`import experiments` works in a checkout alone.
"""

import importlib.util

if importlib.util.find_spec("ml_collections") is None:
  raise ImportError(
    "experiments need packages that tokjax does not: pip install"
    " 'tokjax[experiments]', or -e '.[experiments]' in a checkout"
  )
