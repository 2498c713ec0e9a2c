"""Llama-2-7B-chat with AimMerging as released, on any benchmark.

python -m aim_jax.main --config configs/llama2_7b.py --set data.root=DATA --workdir RUN
    [--set data.benchmark=long_sequence --set data.order=1]

The base is the Hugging Face directory models/Llama-2-7b-chat-hf, or --set model.path=DIR. Weights
are bfloat16; a step takes 26 GB with rows of 512 tokens: on chips with less,
--set model.remat=full. The release has scripts for T5 alone; these are their settings on the
model's q_proj and v_proj.
Time and score: not run yet.
"""

from aim_jax import config
from aim_jax.methods import aim

CONFIG = config.Config(
    model=config.Model(path="models/Llama-2-7b-chat-hf", dtype="bfloat16"),
    data=config.Data(benchmark="standard_cl"),
    train=config.Train(batch_size=32, micro_batch_size=8, learning_rate=3e-4),
    lora=config.Lora(target=("q_proj", "v_proj")),
    method=aim.Options(),
)
