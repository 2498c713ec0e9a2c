"""The low-rank delta: a tree of A (r, in) and B (out, r) beside the weights it changes.

Source: Hu et al. 2021 (arXiv 2106.09685); defaults and names as PEFT's LoraConfig.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

import aim_jax
from aim_jax import config

Tree = dict[str, Any]
# More than any stack has: what a pattern is asked about.
LAYERS = 200
# PEFT's word for every module that can have a delta.
ALL = "all-linear"


def scale(cfg: config.Lora) -> float:
    """alpha / r, or alpha / sqrt(r) when rank-stabilised (Kalajdzievski 2023)."""
    return cfg.alpha / (cfg.r**0.5 if cfg.use_rslora else cfg.r)


def of_rank(cfg: config.Lora, rank: int) -> config.Lora:
    """`cfg` for an adapter of another rank, at the same scale."""
    if rank == cfg.r:
        return cfg
    alpha = scale(cfg) * (rank**0.5 if cfg.use_rslora else rank)
    return dataclasses.replace(cfg, r=rank, alpha=alpha)


def dense(keys: dict[str, str]) -> dict[str, str]:
    """Paths of the modules that can have a delta -> their Hugging Face module names.

    Those are the dense layers of the stacks; embeddings, heads and norms cannot.
    """
    return {
        path.removesuffix("/weight"): name.removesuffix(".weight")
        for path, name in keys.items()
        if path.endswith("/weight")
        and "norm" not in path
        and {"layers", "last"} & set(path.split("/"))
    }


def named(keys: dict[str, str], cfg: config.Lora) -> bool:
    """Whether `lora.target` gives module names, not one regular expression (PEFT)."""
    modules = dense(keys).values()
    return len(cfg.target) > 1 or any(_ends(n, cfg.target[0]) for n in modules)


def targets(keys: dict[str, str], cfg: config.Lora) -> dict[str, str]:
    """Paths of the modules that `lora.target` names -> their Hugging Face module names.

    As PEFT: several names match a module's last part; one entry alone that is no such
    name is a regular expression for the whole module name, which must treat all layers
    alike, or `all-linear`. Raises InputError where nothing matches, listing the names
    there are.
    """
    modules = dense(keys)
    if not cfg.target:
        unmatched, found = ["(empty)"], {}
    elif cfg.target == (ALL,):
        unmatched, found = [], modules
    elif named(keys, cfg):
        found = {
            p: n for p, n in modules.items() if any(_ends(n, t) for t in cfg.target)
        }
        unmatched = [
            t for t in cfg.target if not any(_ends(n, t) for n in found.values())
        ]
    else:
        try:
            pattern = re.compile(cfg.target[0])
        except re.error as error:
            raise aim_jax.InputError(f"lora.target: bad pattern: {error}") from None
        matched = {
            path: [bool(pattern.fullmatch(name.format(i))) for i in range(LAYERS)]
            for path, name in modules.items()
        }
        found = {p: n for p, n in modules.items() if any(matched[p])}
        partly = [n for p, n in found.items() if not all(matched[p])]
        if partly:
            raise aim_jax.InputError(
                f"lora.target: '{cfg.target[0]}' takes {partly[0]} of some layers only; a"
                r" delta has all layers of a stack: write \d+ for the layer's number"
            )
        unmatched = [] if found else list(cfg.target)
    if unmatched:
        last = sorted({n.rpartition(".")[2] for n in modules.values()})
        raise aim_jax.InputError(
            f"lora.target: no module '{', '.join(unmatched)}'; there are {', '.join(last)}"
        )
    return found


def init(key: jax.Array, params: Tree, keys: dict[str, str], cfg: config.Lora) -> Tree:
    """A fresh float32 delta: A uniform in +-1/sqrt(in), B zero, as PEFT initialises.

    params: base tree, or its shapes. Layers stacked on a leading axis stay stacked.
    """
    flat, delta = traverse_util.flatten_dict(params, sep="/"), {}
    for number, path in enumerate(sorted(targets(keys, cfg))):
        weight = flat[f"{path}/weight"]
        *layers, _, width = weight.shape
        # Of a quantized weight the scale tells how many outputs there are.
        out = flat.get(f"{path}/scale", weight).shape[-2]
        delta[f"{path}/a"] = jax.random.uniform(
            jax.random.fold_in(key, number),
            (*layers, cfg.r, width),
            jnp.float32,
            -(width**-0.5),
            width**-0.5,
        )
        delta[f"{path}/b"] = jnp.zeros((*layers, out, cfg.r), jnp.float32)
    return traverse_util.unflatten_dict(delta, sep="/")


def bind(delta: Tree, cfg: config.Lora, train: bool = False) -> Tree:
    """The `lora` collection of a model: B scaled, and the dropout rate when training."""

    def module(a: jax.Array, b: jax.Array) -> Tree:
        bound = {"a": a, "b": b * scale(cfg)}
        if train and cfg.dropout:
            bound["rate"] = jnp.full(a.shape[:-2], cfg.dropout, a.dtype)
        return bound

    return map_modules(module, delta)


def units(delta: Tree) -> Tree:
    """Zeros for the units of each module: a (..., r) of A x, b (..., out) of the output."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape[:-1], jnp.float32), delta)


def measured(bound: Tree, magnitudes: Tree, real: Any, path: str = "") -> Tree:
    """A `lora` collection whose modules also measure their units (`layers.measure`).

    magnitudes: a tree of `units`, whose gradient is what is measured; real(path) -> (b, t):
    1 at the tokens that a module runs over, 0 at padding.
    """
    if "a" in bound:
        a, b = magnitudes["a"], magnitudes["b"]
        here = real(path[1:])
        here = jnp.broadcast_to(here, (*a.shape[:-1], *here.shape))
        return {**bound, "on_a": a, "on_b": b, "real": here}
    return {
        k: measured(v, magnitudes[k], real, f"{path}/{k}") for k, v in bound.items()
    }


def fold(params: Tree, delta: Tree, cfg: config.Lora) -> Tree:
    """The base tree with scale * B A added to the weights that have a delta."""

    def walk(base: Tree, low: Tree) -> Tree:
        if "a" in low:
            change = scale(cfg) * jnp.einsum("...or,...ri->...oi", low["b"], low["a"])
            weight = base["weight"]
            folded = (weight.astype(jnp.float32) + change).astype(weight.dtype)
            return {**base, "weight": folded}
        return {k: walk(v, low[k]) if k in low else v for k, v in base.items()}

    return walk(params, delta)


def map_modules(function: Any, delta: Tree) -> Tree:
    """The delta's tree with each module {a, b} replaced by `function(a, b)`."""
    if "a" in delta:
        return function(delta["a"], delta["b"])
    return {k: map_modules(function, v) for k, v in delta.items()}


def stack(delta: Tree, count: int) -> Tree:
    """Zeros for `count` adapters like `delta`: its leaves with another leading axis."""
    return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), delta)


@jax.jit
def put(stack: Tree, number: int, delta: Tree) -> Tree:
    """`stack` with `delta` at `number`."""
    return jax.tree.map(lambda s, x: s.at[number].set(x), stack, delta)


@jax.jit
def pick(stack: Tree, number: int) -> Tree:
    """The adapter of `stack` at `number`."""
    return jax.tree.map(lambda s: s[number], stack)


def widen(delta: Tree, count: int) -> Tree:
    """Zeros for `count` adapters like `delta` side by side, as one of their summed rank."""

    def module(a: jax.Array, b: jax.Array) -> Tree:
        *layers, r, width = a.shape
        return {
            "a": jnp.zeros((*layers, count * r, width), a.dtype),
            "b": jnp.zeros((*b.shape[:-1], count * r), b.dtype),
        }

    return map_modules(module, delta)


@jax.jit
def put_part(wide: Tree, number: int, delta: Tree) -> Tree:
    """`wide`, the adapters side by side, with `delta` as the one at `number`."""

    def place(path: tuple, whole: jax.Array, part: jax.Array) -> jax.Array:
        axis = -2 if path[-1].key == "a" else -1
        at = number * part.shape[axis]
        return jax.lax.dynamic_update_slice_in_dim(whole, part, at, axis)

    return jax.tree.map_with_path(place, wide, delta)


def concatenate(left: Tree, right: Tree) -> Tree:
    """Two adapters side by side: the one whose change B A is the sum of theirs."""

    def join(path: tuple, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.concatenate([x, y], -2 if path[-1].key == "a" else -1)

    return jax.tree.map_with_path(join, left, right)


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")
