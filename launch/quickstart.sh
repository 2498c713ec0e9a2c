#!/usr/bin/env bash
# AimMerging and sequential LoRA on the embedded model and tasks, side by side.
# Further arguments go to both runs: bash launch/quickstart.sh --set train.seed=1
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
venv requirements.txt

runs=runs/quickstart
for method in aim sequential; do
    .venv/bin/python -m aim_jax.main --config configs/quickstart.py \
        --set "method.name=$method" --workdir "$runs/$method" "$@"
done
.venv/bin/python -m aim_jax.report "$runs/aim" "$runs/sequential" --out "$runs/report.html"
sed -n '/^|/,/^$/p;/^$/q' "$runs/report.md"
echo "report: $runs/report.html"
