"""Qwen3 dense (norms of queries and keys) and Qwen2 / 2.5 (biases of q, k and v).

Source: Yang et al. 2025 (arXiv 2505.09388), Yang et al. 2024 (arXiv 2407.10671).
"""

from typing import Any

from aim_jax.models import decoder

KIND = decoder.KIND
EMBEDDING = decoder.EMBEDDING
COPIES = decoder.COPIES
IGNORED = decoder.IGNORED
RULES = decoder.RULES
Config = decoder.Config
Model = decoder.Model
keys = decoder.keys


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Config of a parsed config.json. Raises InputError for what is not supported."""
    newer = hf["model_type"] == "qwen3"
    if newer:
        hf = {"head_dim": 128, **hf}
    turn = decoder.frequencies(decoder.rope(hf), decoder.head_width(hf))
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    first = hf.get("max_window_layers", 28)
    names = hf.get("layer_types") or [
        "full_attention" if window is None or i < first else "sliding_attention"
        for i in range(hf["num_hidden_layers"])
    ]
    kinds, pattern = decoder.used(
        {
            "full_attention": decoder.Kind(turn),
            "sliding_attention": decoder.Kind(turn, window),
        },
        names,
    )
    return decoder.config_from_hf(
        hf,
        kinds,
        pattern,
        refused={"attention_bias": (False, None)},
        qkv_bias=not newer,
        qk_norm=newer,
    )
