"""Rehearsal on a forgetting curve whose clock is the step: FOREVER with a plain clock.

A day is S steps, and the penalty of a rehearsal has the constant weight beta. Source: what
FOREVER's baseline keeps of view-batch training (arXiv 2601.03938), as third parties sum it
up: Ebbinghaus spacing, on steps. The original is about views of images, and not this.
"""

import dataclasses

from aim_jax import methods
from aim_jax.methods import forever


@dataclasses.dataclass(frozen=True)
class Options(forever.Options):
    """Constants of FOREVER; the speed is always that of the first day."""

    name: str = "step_ebbinghaus"


def make(options: Options) -> methods.Method:
    """The method whose clock counts steps."""
    return forever.scheduled(options, lambda signals: 1.0)
