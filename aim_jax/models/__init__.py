"""Model families: one file each.

A family is a module of this folder with

    KIND                  `encdec` or `decoder`
    Config                frozen dataclass; config_from_hf(dict) -> Config. `model.dtype`,
                          `.remat`, `.attention` and `.dropout` go into fields of these
                          names; `head_width`: features of a head
    Model(config)         Linen module, see below
    keys(config) -> dict  path of each parameter -> Hugging Face name, `{}` = layer number
    EMBEDDING             path of the token embeddings (v, i)
    COPIES                names that a checkpoint may repeat -> the name they are a copy of
    IGNORED               regular expressions of names that no one needs
    RULES                 (pattern of a path, spec over the axes `data` and `tensor`), how
                          `parallel` splits the weights

and its Model offers, on a batch of `inputs` (b, s) int32, `mask` (b, s) bool, `targets`
(b, k) int32 and their float32 `weights`, 0 for padding,

    __call__(batch) -> float32 logits (b, k, v), those that predict `targets`
    prefill(batch, length, index) -> (float32 logits (b, v) of the first new token, cache)
    step(token (b,), cache) -> (float32 logits (b, v) of the next token, cache)
    widen(cache, extra) -> the cache with room for prompts of `extra` more tokens
    real(path, batch) -> bool (b, t): where the positions that the dense layer at `path`
        runs over are tokens and not padding; the last ones, if it runs over fewer

where `length` new tokens at most fit the cache. It holds keys and values (..., b, k, s, d),
`mask` (b, s) of the prompts, other arrays (b, ...), and `index`: the place, of `length`, that
the next token's keys and values are written to. It is the same for all rows and goes
round, so that rows of any age can share a cache. For an `encdec` family `inputs` feed the
encoder. For a `decoder` family rows are right-aligned: `inputs` are prompt and answer
without the last token, and the last k positions predict `targets`. Where examples share
rows, `segments` (b, s) tells from 1 whose each token is, and to an `encdec` family `owners`
(b, k) whose each target is: a token sees its own example alone.

Layers that a scan repeats are stacked on axis 0 under a path part `layers`; a layer that
stands alone is `last`. Only their dense layers can have a delta.
"""

import importlib
from types import ModuleType

import aim_jax

FAMILIES = {
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen3",
    "qwen3": "qwen3",
    "t5": "t5",
}


def family(model_type: str) -> ModuleType:
    """The module of a Hugging Face `model_type`; InputError lists the supported ones."""
    if model_type not in FAMILIES:
        raise aim_jax.InputError(
            f"config.json: model_type '{model_type}' is not supported; supported are"
            f" {', '.join(sorted(FAMILIES))}"
        )
    return importlib.import_module(f"{__name__}.{FAMILIES[model_type]}")
