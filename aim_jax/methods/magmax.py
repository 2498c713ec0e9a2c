"""MagMax: an adapter for each task alone, evaluated are the entries that moved most.

Source: Marczak et al. 2024 (arXiv 2407.06322), `fusion.magmax`, but for the tasks' being
trained one from another there; the hooks are `merging.make`.
"""

import dataclasses

from aim_jax import merging


@dataclasses.dataclass(frozen=True)
class Options(merging.Options):
    """No fields of its own."""

    name: str = "magmax"


make = merging.make
