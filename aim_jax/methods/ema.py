"""EMA: sequential training, evaluated is a running average of the adapter over the steps.

Every `every` steps of a task, or after the last of one that has fewer, the average becomes
decay * average + (1 - decay) * theta; it begins as the fresh adapter's, is evaluated after
each task, and is never trained on. It answers whether a controller is better than
averaging. Source: weight averaging (Polyak and Juditsky 1992), entry by entry on A and B
(`fusion.ema`); in product space on the products B A.
"""

import dataclasses

from aim_jax import fusion, methods


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """Constants of the average."""

    name: str = "ema"
    space: str = "factor"  # or `product`
    decay: float = 0.9
    every: int = 8  # steps; where the average moves, a step sent ahead is sent again


def make(options: Options) -> methods.Method:
    """The hooks of the average."""
    rule = fusion.Rule("ema", options.space, decay=options.decay)
    fusion.check(rule)

    def start(delta, tasks):
        return methods.Memo({"average": delta})

    def after_step(tools, state, memo, signals):
        if signals.step % min(options.every, signals.total):
            return state, memo, None
        average = memo.arrays["average"]
        if options.space == "factor":
            average = fusion.ema(average, state.delta, options.decay)
        else:
            average = fusion.merge([average, state.delta], rule)
        return state, memo._replace(arrays={"average": average}), None

    def adapter(delta, memo, number):
        return memo.arrays["average"]

    return methods.Method(start=start, after_step=after_step, adapter=adapter)
