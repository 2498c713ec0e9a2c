"""Fisher merging: an adapter for each task alone, averaged by the precision of each entry.

The precision is the mean squared gradient of the log-likelihood of the task's rows, one by
one, at the task's adapter (the diagonal of the empirical Fisher matrix), plus a floor.
Source: Matena and Raffel 2022 (arXiv 2111.09832), `fusion.fisher`; the hooks are
`merging.make`.
"""

import dataclasses

from aim_jax import merging


@dataclasses.dataclass(frozen=True)
class Options(merging.Options):
    """Constants of the precision."""

    name: str = "fisher"
    fisher_rows: int | None = None  # rows that F is measured on; None: all of the task
    fisher_floor: float = 1e-6


make = merging.make
