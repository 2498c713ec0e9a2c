"""SIGTERM, by which a scheduler takes its machine back: noted, and acted on between steps.

A step, or a batch of an evaluation, is never cut short. Whoever polls decides what to save.
"""

import signal

import jax
from absl import logging
from jax.experimental import multihost_utils

_noticed = False
_asked = 0


class Preempted(Exception):
    """The machine is wanted back; whatever was computed is saved."""


def watch() -> None:
    """From now on note SIGTERM instead of dying of it."""
    if jax.process_count() > 1:
        return  # JAX does, and has all processes stop at the same step.
    signal.signal(signal.SIGTERM, _note)


def noticed() -> bool:
    """Whether the machine is wanted back.

    Of several processes any one's: all are told at the same call, so all must ask alike.
    """
    global _asked
    _asked += 1
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(_asked)
    return _noticed


def check() -> None:
    """Raise Preempted if the machine is wanted back: for work that leaves no state."""
    if noticed():
        raise Preempted


def _note(number: int, frame: object) -> None:
    global _noticed
    _noticed = True
    logging.warning("SIGTERM: the state is saved after this step, then the run stops")
