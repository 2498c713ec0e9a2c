"""Multitask learning: one adapter trained on all tasks at once, the upper bound.

Nothing is trained before the last task of the stream; then the rows of all tasks are,
shuffled together, for as many epochs as any method passes over them. There is no score
before that, so no BWT and no FWT. Source: MTL, the bound of AimMerging (arXiv 2509.17348).
"""

import dataclasses
import itertools

from aim_jax import methods


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """No fields of its own."""

    name: str = "multitask"


def make(options: Options) -> methods.Method:
    """The method that only changes the rows of a task."""

    def rows(stream, number, memory):
        last = number == len(stream) - 1
        return list(itertools.chain.from_iterable(stream)) if last else []

    return methods.Method(rows=rows)
