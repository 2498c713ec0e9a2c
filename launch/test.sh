#!/usr/bin/env bash
# All tests but the slow ones; --all for every one. Further arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
venv tests/requirements.txt requirements.txt

export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 TF_CPP_MIN_LOG_LEVEL=2
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "" "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest "$@"
