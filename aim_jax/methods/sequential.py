"""Sequential LoRA: one adapter fine-tuned on every task in turn, nothing kept back."""

import dataclasses

from aim_jax import methods


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """No fields of its own."""

    name: str = "sequential"


def make(options: Options) -> methods.Method:
    """The method without a hook."""
    return methods.Method()
