"""Methods that train an adapter on each task alone, and merge all adapters there are.

Every task begins from the same fresh adapter theta_0. After it, its adapter joins those of
the earlier tasks, and what is evaluated is the merge of them all, made anew; nothing of it
is trained on. No data is kept, but one adapter a task is.
"""

import dataclasses

import jax
import jax.numpy as jnp

from aim_jax import fusion, lora, methods


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """What every such method has; fields that `fusion.Rule` has too become its own."""

    space: str = "factor"  # or `product`
    scale: float | None = None  # of the merge; None: as `fusion.Rule`


def make(options: Options) -> methods.Method:
    """The hooks of the method whose rule is named as it is.

    In factor space the rule merges theta_i - theta_0, and theta_0 is added: that is theta_0
    + lambda sum delta_i for task arithmetic. In product space it merges the changes of the
    weights, which B = 0 makes none at theta_0 (one from `lora.path` counts as a part of
    every adapter). A single adapter is left as it is.
    """
    fields = {f.name for f in dataclasses.fields(fusion.Rule)}
    values = dataclasses.asdict(options)
    rule = fusion.Rule(**{k: v for k, v in values.items() if k in fields})
    fusion.check(rule)

    def start(delta, tasks):
        kept = lora.stack(delta, tasks)
        arrays = {"origin": delta, "kept": kept}
        if rule.name == "fisher":
            arrays["fishers"] = kept
        return methods.Memo(arrays)

    def before_task(tools, state, memo):
        return state._replace(delta=memo.arrays["origin"]), memo

    def after_task(tools, state, memo):
        number, origin = tools.number, memo.arrays["origin"]
        new = {"kept": state.delta}
        if rule.name == "fisher":
            new["fishers"] = tools.fisher(state, memo, options.fisher_rows)
        kept = {k: lora.put(memo.arrays[k], number, tree) for k, tree in new.items()}
        memo = memo._replace(arrays=memo.arrays | kept)
        if number == 0:
            return state, memo
        found = {
            name: [lora.pick(stack, i) for i in range(number + 1)]
            for name, stack in kept.items()
        }
        deltas, fishers = found["kept"], found.get("fishers")
        if rule.space == "product":
            merged = fusion.merge(deltas, rule, fishers=fishers)
            return state._replace(delta=merged), memo
        changes = [jax.tree.map(jnp.subtract, delta, origin) for delta in deltas]
        merged = fusion.merge(changes, rule, fishers=fishers)
        return state._replace(delta=jax.tree.map(jnp.add, origin, merged)), memo

    return methods.Method(
        alone=True, start=start, before_task=before_task, after_task=after_task
    )
