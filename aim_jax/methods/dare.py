"""DARE: an adapter for each task alone, thinned at random, rescaled and merged.

Source: Yu et al. 2024 (arXiv 2311.03099), `fusion.dare`; the hooks are `merging.make`.
"""

import dataclasses

from aim_jax import merging


@dataclasses.dataclass(frozen=True)
class Options(merging.Options):
    """Constants of DARE."""

    name: str = "dare"
    density: float = 0.2  # probability that an entry is kept
    drop_into: str = "linear"  # the rule for what is left, or `ties`
    seed: int = 0  # of the masks


make = merging.make
