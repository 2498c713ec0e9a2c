"""Continual learning for language models in JAX, with AimMerging at its heart."""

import contextlib
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
