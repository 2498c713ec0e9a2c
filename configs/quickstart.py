"""The embedded tasks with AimMerging on the embedded model: what `launch/quickstart.sh` runs.

python -m aim_jax.main --config configs/quickstart.py --workdir runs/quickstart/aim

Time and scores: README.md.
"""

from aim_jax import config
from aim_jax.methods import aim

CONFIG = config.Config(
    data=config.Data(device_rows=16),  # all are of one length
    memory=config.Memory(percent=4.0, batch_size=16),
    train=config.Train(batch_size=16, learning_rate=3e-3),
    method=aim.Options(),
    eval=config.Eval(batch_size=100, max_length=16),
)
