"""Replay at a fixed interval: after every so many steps of a task, some on the memory.

A step on the memory is an update on a batch of it, at the rate of the next step and
with the same optimizer. Source: fixed-interval replay, the control of AimMerging's
adaptive interval (arXiv 2509.17348) and of FOREVER's schedules (arXiv 2601.03938).
"""

import dataclasses

from aim_jax import methods


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """When to rehearse and how long."""

    name: str = "replay_interval"
    interval: int = 8  # steps of the task
    rehearsal: int = 1  # then so many on the memory


def make(options: Options) -> methods.Method:
    """The method that interleaves."""

    def after_step(tools, state, memo, signals):
        if tools.remembered and signals.step % options.interval == 0:
            state, _ = tools.rehearse(state, memo, signals.step, options.rehearsal)
        return state, memo, None

    return methods.Method(memory=True, after_step=after_step)
