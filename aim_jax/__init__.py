"""Continual learning for language models in JAX, with AimMerging at its heart."""

import contextlib
import os
import platform
import sys
from collections.abc import Iterator, Sequence

__version__ = "0.1.0"


class InputError(ValueError):
    """What the user gave cannot be used; the message names the culprit and the cure."""


@contextlib.contextmanager
def command(argv: Sequence[str]) -> Iterator[None]:
    """The body of a command that takes flags alone: an InputError is one line and status 2."""
    try:
        if len(argv) > 1:
            raise InputError(f"'{argv[1]}': give values as --flag=value")
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def large_pages() -> None:
    """Start this process anew with its memory in large pages, where it has small ones.

    On a CPU a compiled call takes new memory for all that it makes on its way, and to get
    that page by page takes up to half of a step's time (docs/performance.md). glibc reads
    how to only when a process starts.
    """
    name, setting = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
    given = os.environ.get(name, "")
    if platform.libc_ver()[0] == "glibc" and setting not in given:
        os.environ[name] = ":".join(filter(None, (given, f"{setting}=1")))
        os.execv(sys.executable, sys.orig_argv)
