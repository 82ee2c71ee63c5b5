#!/usr/bin/env bash
# Lint, types, and the README's table: what has to hold before a commit.
#   PYTHON=.venv/bin/python scripts/check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
"$python" -m ruff check .
"$python" -m pyrefly check
"$python" -m scripts.recipes_table --check
