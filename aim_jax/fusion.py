"""Jitted weighted averages of parameter trees."""

from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


@jax.jit
def fuse(
    origin: Tree, inner: Tree, outer: Tree, w_in: float, w_out: float
) -> tuple[Tree, jax.Array]:
    """theta_0 + (w_in * (theta_k - theta_0) + w_out * (theta_out - theta_k)), and motion.

    origin: theta_0, the last merge point; inner: theta_k, after the steps on the task;
    outer: theta_out, after rehearsal from theta_k. The motion is sum |theta_k - theta_0|
    over all entries, the learning signal before its division. Source: arXiv 2509.17348;
    order of operations as the release (semantics.md 3.7).
    """
    fused = jax.tree.map(
        lambda o, i, r: o + (w_in * (i - o) + w_out * (r - i)), origin, inner, outer
    )
    moved = jax.tree.map(lambda o, i: jnp.sum(jnp.abs(i - o)), origin, inner)
    return fused, jax.tree.reduce(jnp.add, moved)
