"""T5-large (770M) with AimMerging as released, on any benchmark.

python -m aim_jax.main --config configs/t5_large.py --set data.root=DATA --workdir RUN
    [--set data.benchmark=long_sequence --set data.order=1]

The base is the Hugging Face directory models/t5-large, or --set model.path=DIR. Settings of the
release's scripts: its Standard CL, Long Sequence and SuperNI runs share them.
Time and score: not run yet.
"""

from aim_jax import config
from aim_jax.methods import aim

CONFIG = config.Config(
    model=config.Model(path="models/t5-large"),
    data=config.Data(benchmark="standard_cl"),
    train=config.Train(batch_size=32, micro_batch_size=8, learning_rate=3e-4),
    method=aim.Options(),
)
