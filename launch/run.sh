# shellcheck shell=bash
# Sourced by the scripts that drive other machines.

dry=${dry:-}

# run COMMAND...: execute it; with --dry-run only print it.
run() {
    if [ "$dry" ]; then
        printf '%q ' "$@" | sed 's/ $/\n/'
    else
        "$@"
    fi
}

# usage: the comment at the head of the script, as an error.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
