"""Task arithmetic: an adapter for each task alone, evaluated is their scaled sum.

Source: Ilharco et al. 2023 (arXiv 2212.04089), `fusion.task_arithmetic`; the scale lambda
is 0.3 where not given. The hooks are `merging.make`.
"""

import dataclasses

from aim_jax import merging


@dataclasses.dataclass(frozen=True)
class Options(merging.Options):
    """No fields of its own."""

    name: str = "task_arithmetic"


make = merging.make
