#!/usr/bin/env bash
# AimMerging and sequential LoRA on the embedded model and tasks, side by side.
# Further arguments go to both runs, which RUNS (a folder) keeps apart from those before:
# RUNS=runs/seed1 bash launch/quickstart.sh --set train.seed=1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
venv requirements.txt

runs=${RUNS:-runs/quickstart}
for method in aim sequential; do
    .venv/bin/python -m aim_jax.main --config configs/quickstart.py \
        --set "method.name=$method" --workdir "$runs/$method" "$@"
done
.venv/bin/python -m aim_jax.report "$runs/aim" "$runs/sequential" \
    --out "$runs/report.html" >/dev/null
# The first table of the report's Markdown twin.
awk '/^\|/ { print; table = 1; next } table { exit }' "$runs/report.md"
echo "report: $runs/report.html"
