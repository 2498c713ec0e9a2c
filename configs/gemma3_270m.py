"""Gemma 3 270M with AimMerging as released, on any benchmark.

python -m aim_jax.main --config configs/gemma3_270m.py --set data.root=DATA --workdir RUN
    [--set data.benchmark=long_sequence --set data.order=1]

The base is the Hugging Face directory models/gemma-3-270m, or --set model.path=DIR. The release has
scripts for T5 alone; these are their settings on the model's q_proj and v_proj.
Score with fewer rows and steps: docs/benchmarks.md; with these settings: not run yet.
"""

from aim_jax import config
from aim_jax.methods import aim

CONFIG = config.Config(
    model=config.Model(path="models/gemma-3-270m"),
    data=config.Data(benchmark="standard_cl"),
    train=config.Train(batch_size=32, micro_batch_size=8, learning_rate=3e-4),
    lora=config.Lora(target=("q_proj", "v_proj")),
    method=aim.Options(),
)
