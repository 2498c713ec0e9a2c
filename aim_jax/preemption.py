"""SIGTERM, by which a scheduler takes its machine back, and Ctrl-C: acted on between steps.

A step, or a batch of an evaluation, is never cut short. Whoever polls decides what to save.
"""

import signal

import jax
from absl import logging
from jax.experimental import multihost_utils

_noticed: int | None = None  # the signal
_asked = 0


class Preempted(Exception):
    """The machine is wanted back, or the user stops; whatever was computed is saved."""


def watch() -> None:
    """From now on note SIGTERM, and the first Ctrl-C, instead of dying of it."""
    if jax.process_count() > 1:
        return  # JAX does, and has all processes stop at the same step.
    signal.signal(signal.SIGTERM, _note)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # of a job in background
        signal.signal(signal.SIGINT, _note)


def noticed() -> bool:
    """Whether the machine is wanted back.

    Of several processes any one's: all are told at the same call, so all must ask alike.
    """
    global _asked
    _asked += 1
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(_asked)
    return _noticed is not None


def check() -> None:
    """Raise Preempted if the machine is wanted back: for work that leaves no state."""
    if noticed():
        raise Preempted


def by_user() -> bool:
    """Whether what was noticed is Ctrl-C."""
    return _noticed == signal.SIGINT


def _note(number: int, frame: object) -> None:
    global _noticed
    _noticed = _noticed or number
    again = ""
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        again = "; again Ctrl-C stops at once"
    name = signal.Signals(number).name
    logging.warning(
        "%s: the state is saved after this step, then the run stops%s", name, again
    )
