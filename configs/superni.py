"""SuperNI (order 7 or 8) with AimMerging as released, on the embedded model.

python -m aim_jax.main --config configs/superni.py --set data.root=DATA --workdir RUN

Any T5 directory may be the base: --set model.path=DIR. With these settings: not run yet;
with fewer epochs on the embedded model: docs/benchmarks.md has time and score.
"""

from aim_jax import config
from aim_jax.methods import aim

CONFIG = config.Config(
    data=config.Data(benchmark="superni", order=7),
    train=config.Train(batch_size=32, micro_batch_size=8, learning_rate=3e-4),
    method=aim.Options(),
)
