"""Recurrent-KIF: every so many steps, a merge by the importance of every entry.

After `interval` steps on the task (theta_0 to theta_k) come some on the memory (to
theta_out), and the adapter becomes

    theta_0 + share * (theta_k - theta_0) + (1 - share) * (theta_out - theta_k).

Importance is that of TaSL, running means over the steps on the task since the last merge,
and over all on the memory in this task. An entry above the quantile of its kind is high;
its share is 1 where it is so for the task alone, 0 for the memory alone, `both` for both,
else a half. soft=True: the softmax of the two, normalised, at a temperature. AimMerging is
this with an interval that adapts, and one weight for all entries.

Source: Feng et al. 2025 (arXiv 2502.17510), as released; the temperature is that of
TasLoRA. g is the gradient of the mean loss, before it is clipped.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from aim_jax import methods
from aim_jax.methods import tasl


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """Constants of Recurrent-KIF."""

    name: str = "recurrent_kif"
    interval: int = 8  # steps on the task
    rehearsal: int = 4  # then so many on the memory
    beta1: float = 0.85  # what the running mean of I keeps
    beta2: float = 0.85  # what that of |I - mean| keeps
    quantile: float = 0.8  # above it an entry is high
    both: float = 0.4  # share of the task where an entry is high for both
    soft: bool = False
    temperature: float = 0.25  # soft


def make(options: Options) -> methods.Method:
    """The hooks of Recurrent-KIF."""

    def start(delta, tasks):
        return methods.Memo({"origin": delta})

    def before_task(tools, state, memo):
        return state, start(state.delta, None)

    def carry(delta):
        return {"task": tasl.carry(delta), "memory": tasl.carry(delta)}

    def gradients(state, grads, magnitudes, arrays, rehearsal):
        kind = "memory" if rehearsal else "task"
        seen = tasl.observe(state.carry[kind], state.delta, grads, options)
        return grads, state.carry | {kind: seen}

    def after_step(tools, state, memo, signals):
        if not tools.remembered or signals.step % options.interval:
            return state, memo, None
        rehearsed, losses = tools.rehearse(state, memo, signals.step, options.rehearsal)
        fused, share = merge(options, memo.arrays["origin"], state.delta, rehearsed)
        record = {
            "interval": options.interval,
            "rehearsal": options.rehearsal,
            "weights": [float(share), 1 - float(share)],
            "rehearsal_loss": [losses[0], losses[-1]] if losses else [],
        }
        anew = rehearsed.carry | {"task": tasl.carry(fused)}
        state = rehearsed._replace(delta=fused, carry=anew)
        return state, start(fused, None), record

    return methods.Method(
        memory=True,
        start=start,
        before_task=before_task,
        carry=carry,
        gradients=gradients,
        after_step=after_step,
    )


@functools.partial(jax.jit, static_argnums=0)
def merge(options, origin, inner, rehearsed):
    """The merged adapter, and the mean share.

    origin: theta_0; inner: theta_k; rehearsed: the state after rehearsal.
    """
    task, memory = (tasl.scores(rehearsed.carry[k]) for k in ("task", "memory"))
    if options.soft:
        shares = tasl.soft(task, memory, options.temperature)
    else:
        shares = tasl.hard(task, memory, options.quantile, options.both)
    fused = jax.tree.map(
        lambda o, i, r, s: o + (s * (i - o) + (1 - s) * (r - i)),
        origin,
        inner,
        rehearsed.delta,
        shares,
    )
    leaves = jax.tree.leaves(shares)
    return fused, sum(jnp.sum(x) for x in leaves) / sum(x.size for x in leaves)
