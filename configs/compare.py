"""Every method over one stream, under one budget: a run each, and one ranked table.

python -m aim_jax.main --config configs/compare.py --workdir runs/compare --seeds 1,2,3,4,5

All have the same rows, base, epochs and scoring; what a method takes beyond that
(rehearsal and probe steps, memory, FLOPs) is counted and stands in the table, which
runs/compare/report.html opens with. The same command resumes; a run that fails stops no
other, where one process runs all. Any benchmark: --set data.benchmark=standard_cl --set data.order=4 --set
data.root=DATA. Scores of a smaller run: docs/methods.md.
"""

import dataclasses
import pathlib
import runpy

from aim_jax import methods

# Data, memory and training are those of the quickstart.
QUICKSTART = pathlib.Path(__file__).with_name("quickstart.py")
BASE = runpy.run_path(str(QUICKSTART))["CONFIG"]
VARIANTS = {
    "olora=frobenius": ("olora", {"measure": "frobenius"}),
    "migu=random": ("migu", {"random": True}),
    "tasl=rank": ("tasl", {"unit": "rank"}),
    "recurrent_kif=soft": ("recurrent_kif", {"soft": True}),
} | {
    f"{name}=product": (name, {"space": "product"})
    for name in methods.names()
    if hasattr(methods.module(name).Options, "space")
}


def of(name, **options):
    """BASE with a method."""
    method = methods.module(name).Options(**options)
    return dataclasses.replace(BASE, method=method)


SSR = dataclasses.replace(BASE.memory, source="model", prompts=100, max_tokens=64)
CONFIGS = (
    {name: of(name) for name in methods.names()}
    | {label: of(name, **options) for label, (name, options) in VARIANTS.items()}
    | {"replay=ssr": dataclasses.replace(of("replay"), memory=SSR)}
)
