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
    # Where the file leaves it out, Mistral's is that of its class in transformers.
    window = hf.get("sliding_window", 4096) if hf["model_type"] == "mistral" else None
    turn = decoder.frequencies(decoder.rope(hf), decoder.head_width(hf))
    return decoder.config_from_hf(
        hf,
        kinds=(decoder.Kind(turn, window),),
        pattern=(0,) * hf["num_hidden_layers"],
        refused={"attention_bias": (False, None), "mlp_bias": (False, None)},
    )
