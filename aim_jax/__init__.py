"""Continual learning for language models in JAX, with AimMerging at its heart."""

import contextlib
import ctypes
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import flags, logging

__version__ = "0.1.0"
# Options of glibc's mallopt (malloc.h): arenas, blocks outside them, free bytes to keep.
ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD = -8, -4, -1


class InputError(ValueError):
    """What the user gave cannot be used; the message names the culprit and the cure."""


@contextlib.contextmanager
def command(
    argv: Sequence[str],
    leave: Callable[[int], None] = sys.exit,
    stopped: str = "stopped",
    needed: Sequence[str] = (),
) -> Iterator[None]:
    """The body of a command that takes flags alone: an InputError is one line and status 2.

    stopped: what Ctrl-C, status 130, says; needed: flags that must be given. Nothing of
    level INFO is said: of devices (JAX) and libraries (`datasets`) that are not there.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        if len(argv) > 1:
            raise InputError(f"'{argv[1]}': give values as --flag=value")
        for flag in (flags.FLAGS[name] for name in needed):
            if not flag.value:
                raise InputError(f"--{flag.name} is missing: {flag.help}")
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        leave(130)


def check_new(out: pathlib.Path) -> None:
    """Raise InputError if there is something in the folder `out`, of a flag --out."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is not empty; give a new folder")


def keep_memory() -> None:
    """Let this process keep the memory that it frees, for what it needs next.

    On a CPU a compiled call takes memory for all that it makes on its way; to give it back
    each time and get it anew, page by page, takes a seventh of a step and more
    (docs/performance.md). Where the C library is not glibc, or is told by GLIBC_TUNABLES
    what to do, nothing happens.
    """
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        libc = ctypes.CDLL(None)
        for option, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)
