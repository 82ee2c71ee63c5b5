#!/usr/bin/env bash
# Trains on several GPU hosts that can be reached by ssh.
#
#   scripts/launch_gpu_hosts.sh [--dry_run] HOST,HOST,... CONFIG WORKDIR
#     [FLAGS...]
#
# Every host has this checkout at the same path ($TOKJAX_ROOT, default: the
# path here) with a virtual environment in .venv, and shares WORKDIR. The first
# host is the coordinator, on port $TOKJAX_PORT (default 8476). If a process
# fails, the others are told to save and stop; started again, the run goes on.
set -euo pipefail

dry_run=false
if [[ "${1:-}" == "--dry_run" ]]; then
  dry_run=true
  shift
fi
if (($# < 3)); then
  sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
IFS=, read -r -a hosts <<<"$1"
config=$2 workdir=$3
shift 3

root=${TOKJAX_ROOT:-$(cd "$(dirname "$0")/.." && pwd)}
coordinator=${hosts[0]#*@}:${TOKJAX_PORT:-8476}
pids=()
trap 'for pid in "${pids[@]:-}"; do kill -TERM "$pid" 2>/dev/null || true; done' \
  INT TERM

for i in "${!hosts[@]}"; do
  train=$(printf '%q ' .venv/bin/python -m experiments.train \
    --config "$config" --workdir "$workdir" --coordinator "$coordinator" \
    --num_processes "${#hosts[@]}" --process_id "$i" "$@")
  # A terminal (-tt) passes the signals on.
  command=(ssh -tt "${hosts[i]}" "cd $(printf %q "$root") && exec $train")
  printf '%q ' "${command[@]}"
  echo
  if ! $dry_run; then
    "${command[@]}" &
    pids+=($!)
  fi
done

status=0
for _ in "${pids[@]:-}"; do
  [[ ${#pids[@]} -eq 0 ]] && break
  if ! wait -n; then
    status=1
    for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  fi
done
exit $status
