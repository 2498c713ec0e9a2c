"""TIES: an adapter for each task alone, trimmed and averaged where their signs agree.

Source: Yadav et al. 2023 (arXiv 2306.01708), `fusion.ties`; the hooks are `merging.make`.
"""

import dataclasses

from aim_jax import merging


@dataclasses.dataclass(frozen=True)
class Options(merging.Options):
    """Constants of TIES."""

    name: str = "ties"
    density: float = 0.2  # part of the entries that is kept


make = merging.make
