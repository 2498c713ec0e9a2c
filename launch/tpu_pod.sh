#!/usr/bin/env bash
# The main job on a slice of TPU VMs, from this machine (needs gcloud, signed in):
#   bash launch/tpu_pod.sh [--dry-run] --name NAME --zone ZONE --type v5litepod-16
#       [--version v2-alpha-tpuv5-lite] [--spot] [--bucket BUCKET] [--keep]
#       --config FILE --workdir runs/X ...
# Creates the slice or uses the one there is, installs this working tree (but for what git
# ignores) on all workers, runs, shows the log of all, fetches the workdir and deletes the
# slice (--keep leaves it). When the slice is preempted it is made anew and the run goes on. A
# slice of several hosts needs a bucket, mounted on all of them: it holds the workdir, which
# must be a path below runs/. Best is one with a hierarchical namespace, where a checkpoint
# takes its name at once, not file by file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/run.sh
name='' zone='' type='' version=v2-alpha-tpuv5-lite spot=() bucket='' keep='' workdir=''
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --name=* | --zone=* | --type=* | --version=* | --bucket=* | --workdir=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --dry-run) dry=1 && shift ;;
    --name) name=$2 && shift 2 ;;
    --zone) zone=$2 && shift 2 ;;
    --type) type=$2 && shift 2 ;;
    --version) version=$2 && shift 2 ;;
    --bucket) bucket=$2 && shift 2 ;;
    --spot) spot=(--spot) && shift ;;
    --keep) keep=1 && shift ;;
    --workdir) workdir=$2 && arguments+=("$1" "$2") && shift 2 ;;
    *) arguments+=("$1") && shift ;;
    esac
done
{ [ "$name" ] && [ "$zone" ] && [ "$type" ] && [[ $workdir == runs/?* ]]; } || usage
tpu=(gcloud compute tpus tpu-vm)
where=("$name" "--zone=$zone")
apt=https://packages.cloud.google.com/apt

# READY, PREEMPTED, ..., or nothing where there is no such slice.
state() {
    [ "$dry" ] || "${tpu[@]}" describe "${where[@]}" --format='value(state)' 2>/dev/null || true
}

everywhere() {
    run "${tpu[@]}" ssh "${where[@]}" --worker=all --command="$1"
}

provide() {
    local now archive
    archive=$(mktemp -d)/aim_jax.tar.gz
    # shellcheck disable=SC2016
    run bash -o pipefail -c 'git ls-files -zco --exclude-standard | tar -czf "$0" --null -T -' "$archive"
    now=$(state)
    if [ "$now" != READY ]; then
        [ -z "$now" ] || run "${tpu[@]}" delete "${where[@]}" --quiet
        run "${tpu[@]}" create "${where[@]}" "--accelerator-type=$type" "--version=$version" \
            "${spot[@]}"
    fi
    run "${tpu[@]}" scp "$archive" "$name:aim_jax.tar.gz" "--zone=$zone" --worker=all
    # Most images are Ubuntu 22.04, whose Python is 3.10; uv brings one of its own.
    everywhere "mkdir -p aim_jax && tar xzf aim_jax.tar.gz -C aim_jax && cd aim_jax && \
{ .venv/bin/pip --version >/dev/null 2>&1 || \
{ python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' && python3 -m venv .venv; } || \
{ python3 -m pip install -q uv && python3 -m uv venv -q --clear --seed --python 3.12 .venv; }; } && \
.venv/bin/pip install -q -r requirements.txt 'jax[tpu]'"
    if [ "$bucket" ]; then
        # Not on every image.
        everywhere "command -v gcsfuse || \
{ echo deb [signed-by=/usr/share/keyrings/gcsfuse.asc] $apt gcsfuse-\$(lsb_release -cs) main | \
sudo tee /etc/apt/sources.list.d/gcsfuse.list && \
curl -fsS $apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/gcsfuse.asc >/dev/null && \
sudo apt-get -q update && sudo apt-get -qy install gcsfuse; }"
        everywhere "cd aim_jax && mkdir -p runs && \
(mountpoint -q runs || gcsfuse --implicit-dirs --rename-dir-limit=10000 $(printf %q "$bucket") runs)"
    fi
}

main="cd aim_jax && rm -f status
.venv/bin/python -m aim_jax.main$(printf ' %q' "${arguments[@]}") --distributed --preempted_status=75
echo \$? >status; exit \$(cat status)"
while :; do
    provide
    if everywhere "$main"; then
        break
    fi
    # Notice of preemption is given before the slice is gone.
    sleep 60
    if [ "$(state)" = READY ]; then
        code=$("${tpu[@]}" ssh "${where[@]}" --worker=0 --command="cat aim_jax/status")
        [ "$code" = 75 ] || {
            echo "the run failed, see above; the slice is left: the same command uses it," \
                "and ${tpu[*]} delete ${where[*]} deletes it" >&2
            exit 1
        }
    fi
    echo "the slice is going; the run goes on in a new one" >&2
done
mkdir -p "$(dirname "$workdir")"
run "${tpu[@]}" scp --recurse "$name:aim_jax/$workdir" "$(dirname "$workdir")" \
    "--zone=$zone" --worker=0
[ "$keep" ] || run "${tpu[@]}" delete "${where[@]}" --quiet
