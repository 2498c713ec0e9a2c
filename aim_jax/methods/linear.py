"""Averaging: an adapter for each task alone, evaluated is the mean of those so far.

Source: plain average of task vectors, `fusion.linear`; the hooks are `merging.make`.
"""

import dataclasses

from aim_jax import merging


@dataclasses.dataclass(frozen=True)
class Options(merging.Options):
    """No fields of its own."""

    name: str = "linear"


make = merging.make
