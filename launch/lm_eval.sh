#!/usr/bin/env bash
# General ability of a run's last model, by lm-evaluation-harness on the merged export:
#   bash launch/lm_eval.sh RUN OUT --tasks gsm8k,mmlu_pro [further arguments of lm_eval]
# OUT/model is the merged model, made unless it is there; OUT/results is what lm_eval writes.
# The base, for comparison: lm_eval run --model hf --model_args pretrained=BASE --tasks ...
# LM_EVAL names the program (0.4.10 or newer), which is not among the requirements.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 3 ] || {
    echo "usage: bash launch/lm_eval.sh RUN OUT --tasks NAMES" >&2
    exit 2
}
run=$1 out=$2
shift 2
lm_eval=${LM_EVAL:-lm_eval}
command -v "$lm_eval" >/dev/null || {
    echo "error: no program '$lm_eval': pip install \"lm_eval[hf]\", or set LM_EVAL to it" >&2
    exit 1
}

if [ ! -d "$out/model" ]; then
    # What is cut short never looks like a model.
    part=$out/part.$$
    mkdir -p "$part"
    trap 'rm -rf "$part"' EXIT
    .venv/bin/python -m aim_jax.export --workdir "$run" --format merged --out "$part" \
        >/dev/null
    mv "$part" "$out/model"
fi
"$lm_eval" run --model hf --model_args "pretrained=$out/model" \
    --output_path "$out/results" "$@"
