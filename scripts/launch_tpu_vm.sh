#!/usr/bin/env bash
# Trains on every worker of a TPU VM slice, which find each other by
# themselves. Sets the machines up the first time.
#
#   scripts/launch_tpu_vm.sh [--dry_run] NAME ZONE CONFIG WORKDIR [FLAGS...]
#
# WORKDIR must be shared by the workers (gs://... mounted, or NFS). Started
# again, the run goes on from its last checkpoint.
set -euo pipefail

dry_run=false
if [[ "${1:-}" == "--dry_run" ]]; then
  dry_run=true
  shift
fi
if (($# < 4)); then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 config=$3 workdir=$4
shift 4

root=$(cd "$(dirname "$0")/.." && pwd)
commit=$(git -C "$root" rev-parse HEAD)
target=tokjax-${commit:0:12}
archive=/tmp/$target.tar.gz

# Quotes every argument, so that it reaches the remote shell as it is here.
train=$(printf '%q ' .venv/bin/python -m experiments.train \
  --config "$config" --workdir "$workdir" --distributed "$@")
setup="mkdir -p $target && tar -xzf $target.tar.gz -C $target && cd $target \
&& (test -d .venv || python3 -m venv .venv) \
&& .venv/bin/pip install --quiet '.[experiments,tpu]' \
-f https://storage.googleapis.com/jax-releases/libtpu_releases.html"

run() {
  printf '%q ' "$@"
  echo
  $dry_run || "$@"
}

tpu=(gcloud compute tpus tpu-vm)
where=("$name" --zone "$zone" --worker=all)
run git -C "$root" archive --format=tar.gz --output "$archive" HEAD
run "${tpu[@]}" scp "$archive" "$name:$target.tar.gz" --zone "$zone" --worker=all
run "${tpu[@]}" ssh "${where[@]}" --command "$setup"
run "${tpu[@]}" ssh "${where[@]}" --command "cd $target && $train"
