#!/usr/bin/env bash
# The main job on GPU nodes of a SLURM cluster; DIR is on a file system that all nodes share:
#   bash launch/slurm.sh [--dry-run] [--nodes 1] [--gpus 8] [--per node|gpu] [--time 24:00:00]
#       [--partition NAME] --config FILE --workdir DIR ...
# One process a node or a GPU. Two minutes before its time is up, or when it is preempted,
# the run saves its state, and the job goes back into the queue until the run is finished.
# .venv must hold the jax of the cluster: .venv/bin/pip install "jax[cuda13]"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/run.sh
nodes=1 gpus=8 per=node time=24:00:00 partition=() workdir=run
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --nodes=* | --gpus=* | --per=* | --time=* | --partition=* | --workdir=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --dry-run) dry=1 && shift ;;
    --nodes) nodes=$2 && shift 2 ;;
    --gpus) gpus=$2 && shift 2 ;;
    --per) per=$2 && shift 2 ;;
    --time) time=$2 && shift 2 ;;
    --partition) partition=("--partition=$2") && shift 2 ;;
    --workdir) workdir=${2%/} && arguments+=("$1" "$2") && shift 2 ;;
    *) arguments+=("$1") && shift ;;
    esac
done
[ ${#arguments[@]} -gt 0 ] || usage
case $per in
# Without being told, JAX gives a process of SLURM one GPU.
node) tasks=1 mine="export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((gpus - 1)))" ;;
gpu) tasks=$gpus mine= ;;
*) usage ;;
esac
options=(--job-name=aim_jax "--nodes=$nodes" "--ntasks-per-node=$tasks"
    "--gpus-per-node=$gpus" "--time=$time" "${partition[@]}" --requeue --open-mode=append
    --signal=TERM@120 "--output=$workdir.slurm.log" --export=ALL)
job=$(
    cat <<JOB
#!/usr/bin/env bash
# SIGTERM is for the processes of the run; this shell waits for them.
trap : TERM
$mine
srun --kill-on-bad-exit=1 $(printf %q "$PWD")/.venv/bin/python -m aim_jax.main$(printf ' %q' "${arguments[@]}") --distributed --preempted_status=75
status=\$?
if [ \$status = 75 ]; then
    exec scontrol requeue "\$SLURM_JOB_ID"
fi
exit \$status
JOB
)
if [ "$dry" ]; then
    run sbatch "${options[@]}"
    echo "$job"
else
    mkdir -p "$(dirname "$workdir")"
    sbatch "${options[@]}" <<<"$job"
fi
