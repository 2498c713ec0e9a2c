"""L2: the adapter is held near what it was after the last task, every entry alike.

    loss + strength / 2 * sum_i (theta_i - theta*_i)^2

It is EWC with F = 1, and its natural control. Source: the baseline of Kirkpatrick et al.
2017 (arXiv 1612.00796).
"""

import dataclasses

import jax
import jax.numpy as jnp

from aim_jax import methods
from aim_jax.methods import ewc


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """Constants of L2; the strength is EWC's."""

    name: str = "l2"
    strength: float = 0.02


def make(options: Options) -> methods.Method:
    """The method that adds a quadratic penalty."""

    def memo_of(delta, value):
        everywhere = jax.tree.map(lambda x: jnp.full((), value, x.dtype), delta)
        return methods.Memo({"fisher": everywhere, "anchor": delta})

    def start(delta, tasks):
        return memo_of(delta, 0)

    def after_task(tools, state, memo):
        return state, memo_of(state.delta, 1)

    return methods.Method(
        start=start, penalty=ewc.quadratic(options.strength), after_task=after_task
    )
