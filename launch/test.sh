#!/usr/bin/env bash
# Style, and all tests but the slow ones; every one with --all as the first argument.
# Further arguments go to pytest: bash launch/test.sh tests/test_config.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh
venv tests/requirements.txt requirements.txt

if [ "${1:-}" = --all ]; then
    shift
    set -- -m "" "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# A file stays with one process: what its tests share is then made once.
.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
