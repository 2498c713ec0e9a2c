# Sourced by the other scripts: goes to the project's root and makes .venv hold what a
# requirements file asks for. Installs only when that file has changed since.
#   venv FILE [FILE it includes ...]

cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv() {
    local python=${PYTHON:-python3} stamp=.venv/$(basename "$(dirname "$1")")-requirements
    if [ ! -x .venv/bin/python ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: $("$python" --version) is too old; set PYTHON to 3.11 or newer" >&2
            exit 1
        }
        "$python" -m venv .venv
    fi
    if ! cat "$@" | cmp -s - "$stamp"; then
        .venv/bin/pip install --quiet --disable-pip-version-check -r "$1"
        cat "$@" >"$stamp"
    fi
}
