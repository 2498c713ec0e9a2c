"""OPCM: an adapter for each task alone, merged one by one into what they leave free.

Source: Tang et al. 2025 (arXiv 2501.09522), `fusion.opcm_step`; the hooks are
`merging.make`, which keeps the adapters, so that in product space only the result is cut to
the rank and not what is merged on.
"""

import dataclasses

from aim_jax import merging


@dataclasses.dataclass(frozen=True)
class Options(merging.Options):
    """Constants of OPCM."""

    name: str = "opcm"
    split: float = 0.5  # share of the singular values that is protected


make = merging.make
