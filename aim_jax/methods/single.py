"""Per-task fine-tuning: a fresh adapter for each task, which is scored with its own.

Nothing is forgotten and nothing transferred: BWT is 0, and OP is the mean of what FWT
compares with. It needs to be told the task at test time. Every adapter begins at the same
values, those of the single-task runs, or of `lora.path`. Source: PerTaskFT ("ONE"), the
reference of FWT in AimMerging (arXiv 2509.17348).
"""

import dataclasses

from aim_jax import lora, methods


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """No fields of its own."""

    name: str = "single"


def make(options: Options) -> methods.Method:
    """The method that keeps every adapter."""

    def start(delta, tasks):
        return methods.Memo({"adapters": lora.stack(delta, tasks)})

    def before_task(tools, state, memo):
        return state._replace(delta=tools.fresh(0)), memo

    def after_task(tools, state, memo):
        kept = lora.put(memo.arrays["adapters"], tools.number, state.delta)
        return state, memo._replace(arrays={"adapters": kept})

    def adapter(delta, memo, number):
        return lora.pick(memo.arrays["adapters"], number)

    return methods.Method(
        alone=True,
        start=start,
        before_task=before_task,
        after_task=after_task,
        adapter=adapter,
    )
