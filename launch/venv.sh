# shellcheck shell=bash
# Sourced by the other scripts in the project's root. Makes .venv hold what a requirements
# file asks for; installs only when that file has changed since.
#   venv FILE [FILE it includes ...]

venv() {
    local python=${PYTHON:-python3} stamp
    stamp=.venv/${1//\//-}.stamp
    # An environment whose making was cut short has no pip, which comes last.
    if ! .venv/bin/python -m pip --version &>/dev/null; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: $python is not Python 3.11 or newer; set PYTHON to one" >&2
            exit 1
        }
        "$python" -m venv --clear .venv
    fi
    if [ "$(cat "$@")" != "$(cat "$stamp" 2>/dev/null)" ]; then
        echo "installing $1 into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
        cat "$@" >"$stamp"
    fi
}
