"""Gemma 3 text: windowed and global layers with two RoPE bases, norms on both sides.

Source: Gemma Team 2025 (arXiv 2503.19786).
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
    hf = {"tie_word_embeddings": True, "head_dim": 256, **hf}
    every = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern", 6))
    names = hf.get("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention"
        for i in range(hf["num_hidden_layers"])
    ]
    settings = hf.get("rope_parameters") or {}
    far = {
        "rope_theta": hf.get("rope_theta", 1e6),
        **(settings.get("full_attention") or {}),
        **(hf.get("rope_scaling") or {}),
    }
    near = {
        "rope_theta": hf.get("rope_local_base_freq", 1e4),
        **(settings.get("sliding_attention") or {}),
    }
    kinds, pattern = decoder.used(
        {
            "full_attention": decoder.Kind(decoder.frequencies(far, hf["head_dim"])),
            "sliding_attention": decoder.Kind(
                decoder.frequencies(near, hf["head_dim"]), hf["sliding_window"]
            ),
        },
        names,
    )
    return decoder.config_from_hf(
        hf,
        kinds,
        pattern,
        refused={
            "attention_bias": (False, None),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        query_scale=hf.get("query_pre_attn_scalar", 256) ** -0.5,
        qk_norm=True,
        sandwich=True,
        norm_offset=1.0,
        embed_scale=hf["hidden_size"] ** 0.5,
    )
