"""SIGTERM, by which a scheduler takes its machine back: noted, and acted on between steps.

A step, or a batch of an evaluation, is never cut short. Whoever polls decides what to save.
"""

import signal

from absl import logging

_noticed = False


class Preempted(Exception):
    """The machine is wanted back; whatever was computed is saved."""


def watch() -> None:
    """From now on note SIGTERM instead of dying of it."""
    signal.signal(signal.SIGTERM, _note)


def noticed() -> bool:
    """Whether the machine is wanted back."""
    return _noticed


def check() -> None:
    """Raise Preempted if the machine is wanted back: for work that leaves no state."""
    if noticed():
        raise Preempted


def _note(number: int, frame: object) -> None:
    global _noticed
    _noticed = True
    logging.warning("SIGTERM: the state is saved after this step, then the run stops")
