"""Incremental LoRA: a new adapter for each task beside the earlier ones, frozen and summed.

The adapters lie side by side as one of rank T r, whose later parts are zero until their
task comes: B A of the whole is the sum of the B_i A_i. Only the current part is trained.
Source: IncLoRA, the baseline of O-LoRA (Wang et al. 2023, arXiv 2310.14152).
"""

import dataclasses

from aim_jax import lora, methods


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """No fields of its own."""

    name: str = "inc_lora"


def make(options: Options) -> methods.Method:
    """The method that grows an adapter by one part a task."""

    def start(delta, tasks):
        # The last adapter is never frozen.
        return methods.Memo({"past": lora.widen(delta, max(1, tasks - 1))})

    def compose(delta, arrays):
        return lora.concatenate(arrays["past"], delta)

    def before_task(tools, state, memo):
        if not tools.number:
            return state, memo
        past = lora.put_part(memo.arrays["past"], tools.number - 1, state.delta)
        state = state._replace(delta=tools.fresh(tools.number))
        return state, memo._replace(arrays={"past": past})

    return methods.Method(start=start, compose=compose, before_task=before_task)
