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


@dataclasses.dataclass(frozen=True)
class Count:
    """tasks: how many were merged."""

    tasks: int = 0


def make(options: Options) -> methods.Method:
    """The hooks of SLAO."""

    def start(delta, tasks):
        return methods.Memo({"tuned": delta, "merged": delta}, Count())

    def before_task(tools, state, memo):
        tuned = memo.arrays["tuned"]
        if memo.host.tasks:
            tuned = fusion.orthonormal(tuned)
        return state._replace(delta=tuned), memo

    def after_task(tools, state, memo):
        number, tuned = memo.host.tasks + 1, state.delta
        merged = memo.arrays["merged"]
        if options.space == "factor" or number == 1:
            merged = fusion.slao(merged, tuned, number)
        else:
            rule, rate = fusion.Rule("linear", options.space), number**-0.5
            merged = fusion.merge([merged, tuned], rule, (1 - rate, rate))
        memo = methods.Memo({"tuned": tuned, "merged": merged}, Count(number))
        return state._replace(delta=merged), memo

    return methods.Method(start=start, before_task=before_task, after_task=after_task)
