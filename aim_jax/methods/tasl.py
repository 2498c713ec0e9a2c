"""TaSL: after each task, what mattered to it is merged with what mattered before.

The importance of an entry is that of AdaLoRA: I = |theta g| in each step; its running mean
times the running mean of |I - mean|. A unit's is the mean over its entries, min-max
normalised over all units: C of the task, P of those before. The adapter becomes, unit by
unit, `share` theta + (1 - share) theta*, theta* what it was before the task; and P becomes
minmax(fresh C + (1 - fresh) P).

unit=matrix (TaSL): units are the A and the B of every layer; above the quantile of its own
kind a unit is high, and the share is `fresh` where both C and P are high, 1 where C alone
is, 0 where P alone is, and else a half.
unit=rank (TasLoRA): units are the pairs of a row of A and a column of B, whose importance is
the product of the two means, with I = |theta g - (theta g)^2 / 2|; the share is the softmax
of C and P at a temperature.

Source: Feng et al. 2024 (arXiv 2408.05200) as released, and its extension. g is the
gradient of the mean loss, before it is clipped.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from aim_jax import lora, methods


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """Constants of TaSL."""

    name: str = "tasl"
    unit: str = "matrix"  # or `rank`
    beta1: float = 0.85  # what the running mean of I keeps
    beta2: float = 0.85  # what that of |I - mean| keeps
    quantile: float = 0.8  # matrix: above it a unit is high
    fresh: float = 0.3  # weight of the newer one where both count
    temperature: float = 0.25  # rank


def make(options: Options) -> methods.Method:
    """The hooks of TaSL."""

    def start(delta, tasks):
        units = jax.eval_shape(functools.partial(units_of, options), carry(delta))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), units)
        return methods.Memo({"before": delta, "importance": zeros})

    def gradients(state, grads, magnitudes, arrays, rehearsal):
        second = options.unit == "rank"
        return grads, observe(state.carry, state.delta, grads, options, second)

    def after_task(tools, state, memo):
        merged, importance = consolidate(
            options, memo.arrays, state.delta, state.carry, tools.number == 0
        )
        arrays = {"before": merged, "importance": importance}
        return state._replace(delta=merged), memo._replace(arrays=arrays)

    return methods.Method(
        start=start, carry=carry, gradients=gradients, after_task=after_task
    )


def carry(delta):
    """Running means of I and of |I - mean|, before any step."""
    zeros = jax.tree.map(jnp.zeros_like, delta)
    return {"mean": zeros, "spread": zeros}


def observe(kept, delta, grads, options, second=False):
    """The running means after one more step; second: I of second order."""

    def importance(theta, g):
        first = theta * g
        return jnp.abs(first - first**2 / 2 if second else first)

    found = jax.tree.map(importance, delta, grads)
    mean = _towards(kept["mean"], found, options.beta1)
    away = jax.tree.map(lambda x, m: jnp.abs(x - m), found, mean)
    return {"mean": mean, "spread": _towards(kept["spread"], away, options.beta2)}


def scores(kept):
    """The importance of every entry."""
    return jax.tree.map(jnp.multiply, kept["mean"], kept["spread"])


def normalised(tree):
    """All values of a tree from 0, the least of them, to 1, the greatest."""
    values = _flat(tree)
    least, width = values.min(), jnp.ptp(values)
    return jax.tree.map(lambda x: (x - least) / jnp.where(width > 0, width, 1), tree)


def hard(new, old, quantile, both):
    """The share of the new one: 1 where it alone is high, 0 where the old one alone is.

    Where both are it is `both`, where none is a half. High: above the quantile of its tree.
    """

    def high(tree):
        least = jnp.quantile(_flat(tree), quantile)
        return jax.tree.map(lambda x: x > least, tree)

    def share(x, y):
        return jnp.where(x == y, jnp.where(x, both, 0.5), jnp.where(x, 1.0, 0.0))

    return jax.tree.map(share, high(new), high(old))


def soft(new, old, temperature):
    """The share of the new one by a softmax of the two, each normalised."""
    return jax.tree.map(
        lambda x, y: jax.nn.sigmoid((x - y) / temperature),
        normalised(new),
        normalised(old),
    )


def units_of(options, kept):
    """The normalised importance of the units: of A as `a`, of B as `b`."""

    def module(a, b):
        if options.unit == "matrix":
            return {"a": a.mean((-2, -1)), "b": b.mean((-2, -1))}
        pair = a.mean(-1) * b.mean(-2)
        return {"a": pair, "b": pair}

    return normalised(lora.map_modules(module, scores(kept)))


@functools.partial(jax.jit, static_argnums=0)
def consolidate(options, arrays, delta, kept, first):
    """The merged adapter, and P; after the first task they are its own, and C."""
    now, past = units_of(options, kept), arrays["importance"]
    if options.unit == "matrix":
        shares = hard(now, past, options.quantile, options.fresh)
    else:
        shares = soft(now, past, options.temperature)

    def mixed(path, new, old, share):
        if options.unit == "rank" and path[-1].key == "b":
            share = share[..., None, :]
        share = share.reshape(*share.shape, *[1] * (new.ndim - share.ndim))
        return jnp.where(first, new, share * new + (1 - share) * old)

    merged = jax.tree.map_with_path(mixed, delta, arrays["before"], shares)
    both = normalised(_towards(past, now, 1 - options.fresh))
    return merged, jax.tree.map(lambda x, y: jnp.where(first, x, y), now, both)


def _towards(old, new, keep):
    return jax.tree.map(lambda x, y: keep * x + (1 - keep) * y, old, new)


def _flat(tree):
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])
