"""Replay: the rows kept of earlier tasks are mixed into the train rows of each new one.

At task t one adapter is trained on D_t and the memory together, shuffled, with the plain
loss; an epoch passes over both. Source: LoRAReplay (MixReplay), the baseline of AimMerging
(arXiv 2509.17348) and SAPT, as their releases do.
"""

import dataclasses

from aim_jax import methods


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """No fields of its own; `memory.percent` and `memory.rule` decide what is kept."""

    name: str = "replay"


def make(options: Options) -> methods.Method:
    """The method that only changes the rows of a task."""

    def rows(stream, number, memory):
        return [*stream[number], *memory]

    return methods.Method(memory=True, rows=rows)
