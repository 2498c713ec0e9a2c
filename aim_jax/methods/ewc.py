"""Elastic weight consolidation: what mattered to earlier tasks is held in place.

    loss + strength / 2 * sum_i F_i (theta_i - theta*_i)^2

theta*: the adapter after the last task; F: the sum over earlier tasks of the mean squared
gradient of a row's log-likelihood (the empirical Fisher information, diagonal), on the
adapter alone. Each task's F is divided by its mean, so that one strength suits models of
any size. Source: Kirkpatrick et al. 2017 (arXiv 1612.00796). Of the strengths used with
language models, TRACE's 400 goes with squared gradients of batches, and SSR's 0.01,
without the half, is the default here.
"""

import dataclasses

import jax
import jax.numpy as jnp

from aim_jax import methods


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """Constants of EWC."""

    name: str = "ewc"
    strength: float = 0.02
    fisher_rows: int | None = None  # rows that F is measured on; None: all of the task
    normalize: bool = True  # divide F by its mean


def make(options: Options) -> methods.Method:
    """The method that adds a quadratic penalty."""

    def start(delta, tasks):
        zeros = jax.tree.map(jnp.zeros_like, delta)
        return methods.Memo({"fisher": zeros, "anchor": zeros})

    def after_task(tools, state, memo):
        found = tools.fisher(state, memo, options.fisher_rows)
        if options.normalize:
            found = normalized(found)
        fisher = jax.tree.map(jnp.add, memo.arrays["fisher"], found)
        return state, memo._replace(arrays={"fisher": fisher, "anchor": state.delta})

    return methods.Method(
        start=start, penalty=quadratic(options.strength), after_task=after_task
    )


def quadratic(strength: float):
    """The penalty strength / 2 * sum F (theta - theta*)^2, F a leaf's entries or one number."""

    def penalty(delta, arrays):
        terms = jax.tree.map(
            lambda f, x, a: jnp.sum(f * (x - a) ** 2),
            arrays["fisher"],
            delta,
            arrays["anchor"],
        )
        return strength / 2 * jax.tree.reduce(jnp.add, terms)

    return penalty


@jax.jit
def normalized(fisher):
    """`fisher` divided by the mean of all its entries."""
    leaves = jax.tree.leaves(fisher)
    mean = sum(jnp.sum(x) for x in leaves) / sum(x.size for x in leaves)
    return jax.tree.map(lambda x: x / jnp.where(mean > 0, mean, 1), fisher)
