"""SLAO: each task begins where the last one ended, and one merged adapter is evaluated.

A task begins with the last one's own A made orthonormal (Q of the QR of A^T) and its own B,
the first one with a fresh adapter. After task i the merged adapter takes its A, and its B by
1 / sqrt(i): B_m + (B - B_m) / sqrt(i). No data is kept, and one adapter more.

Source: SLAO by a third party's implementation that quotes the paper; not checked against the
authors' code. In product space (not in the source) the products B A are averaged at the same
rates.
"""

import dataclasses

from aim_jax import fusion, methods


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """Constants of SLAO."""

    name: str = "slao"
    space: str = "factor"  # or `product`


def make(options: Options) -> methods.Method:
    """The hooks of SLAO."""

    def start(delta, tasks):
        return methods.Memo({"merged": delta})

    def before_task(tools, state, memo):
        if not tools.number:
            return state, memo
        return state._replace(delta=fusion.orthonormal(state.delta)), memo

    def after_task(tools, state, memo):
        number, merged = tools.number + 1, memo.arrays["merged"]
        if options.space == "factor" or number == 1:
            merged = fusion.slao(merged, state.delta, number)
        else:
            rule, rate = fusion.Rule("linear", options.space), number**-0.5
            merged = fusion.merge([merged, state.delta], rule, (1 - rate, rate))
        return state, memo._replace(arrays={"merged": merged})

    def adapter(delta, memo, number):
        return memo.arrays["merged"]

    return methods.Method(
        start=start, before_task=before_task, after_task=after_task, adapter=adapter
    )
