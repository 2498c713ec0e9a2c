#!/usr/bin/env bash
# The main job in several processes on this machine, each with CPU devices of its own, as it
# runs on several hosts:
#   bash launch/local.sh [--dry-run] [--processes 2] [--devices 4] --config FILE --workdir DIR ...
# The first process is shown; the others write DIR.process-N.log. When one fails, all end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/run.sh
processes=2 devices=4 workdir=run
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --processes=* | --devices=* | --workdir=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --dry-run) dry=1 && shift ;;
    --processes) processes=$2 && shift 2 ;;
    --devices) devices=$2 && shift 2 ;;
    --workdir) workdir=${2%/} && arguments+=("$1" "$2") && shift 2 ;;
    *) arguments+=("$1") && shift ;;
    esac
done
[ ${#arguments[@]} -gt 0 ] || usage
port=${PORT:-$((20000 + RANDOM % 10000))}

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
trap 'kill -TERM $(jobs -p) 2>/dev/null || true' TERM INT
for ((i = 0; i < processes; i++)); do
    command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices"
        .venv/bin/python -m aim_jax.main "${arguments[@]}"
        "--coordinator=localhost:$port" "--processes=$processes" "--process=$i")
    if [ "$dry" ]; then
        run "${command[@]}"
    elif [ "$i" = 0 ]; then
        "${command[@]}" &
    else
        mkdir -p "$(dirname "$workdir")"
        "${command[@]}" >"$workdir.process-$i.log" 2>&1 &
    fi
done
[ -z "$dry" ] || exit 0
status=0
for ((i = 0; i < processes; i++)); do
    # Interrupted by a signal, wait says more than 128 while its process goes on.
    wait -n || status=$?
    while [ "$status" -gt 128 ] && [ "$(jobs -rp | wc -l)" = $((processes - i)) ]; do
        status=0
        wait -n || status=$?
    done
    [ "$status" = 0 ] || {
        echo "a process ended with status $status; what others than the first said is in" \
            "$workdir.process-*.log" >&2
        break
    }
done
exit "$status"
