#!/usr/bin/env bash
# The report of runs as docs/example/NAME.html, .md and .json; where Chromium is installed also
# its pictures NAME.png and NAME-dark.png, as a laptop shows it:
#   bash launch/example.sh NAME RUN [RUN ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || {
    echo "usage: bash launch/example.sh NAME RUN [RUN ...]" >&2
    exit 2
}
page=docs/example/$1
shift
.venv/bin/python -m aim_jax.report "$@" --out "$page.html"
browser=$(command -v chromium || command -v chromium-browser || true)
[ -n "$browser" ] || exit 0

picture() { # FILE SCHEME, which Chromium counts: 0 dark, 1 light
    "$browser" --headless=new --no-sandbox --disable-gpu --hide-scrollbars \
        --window-size=1366,1700 --blink-settings="preferredColorScheme=$2" \
        --screenshot="$1" "file://$PWD/$page.html" 2>/dev/null
    echo "$1"
}
picture "$page.png" 1
picture "$page-dark.png" 0
