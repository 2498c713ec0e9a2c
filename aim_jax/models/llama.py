"""Llama 2 and 3, and Mistral, which is the same stack with a sliding window.

Source: Touvron et al. 2023 (arXiv 2307.09288), Jiang et al. 2023 (arXiv 2310.06825).
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
    mistral = hf["model_type"] == "mistral"
    # Where the file leaves it out, Mistral's is that of its class in transformers.
    window = hf.get("sliding_window", 4096) if mistral else None
    turn = decoder.frequencies(decoder.rope(hf), decoder.head_width(hf))
    # With layer_types a Mistral is what transformers calls Ministral; Llama ignores them.
    names = hf.get("layer_types") if mistral else None
    kinds, pattern = decoder.used(
        {
            "full_attention": decoder.Kind(turn),
            "sliding_attention": decoder.Kind(turn, window),
        },
        names or ["sliding_attention"] * hf["num_hidden_layers"],
    )
    return decoder.config_from_hf(
        hf,
        kinds,
        pattern,
        refused={"attention_bias": (False, None), "mlp_bias": (False, None)},
    )
