"""Weighted averages and n-way merges of adapters, as jitted functions of trees.

An adapter's module is {a: (..., r, in), b: (..., out, r)}, its change of the weight B A; a
leading axis stacks layers, each of which is merged by itself. A rule works in one of two
spaces. `factor`: on A and on B, each by itself, as PEFT and the AimMerging release do.
`product`: on B A, whose best approximation of rank r is then factored again. The two
differ even for a plain sum: (B1 + B2)(A1 + A2) has the cross terms B1 A2 + B2 A1 that
B1 A1 + B2 A2 has not.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

import aim_jax

Tree = Any
ROWS = 64  # of a product that are in memory at once
OVERSAMPLE = 8  # columns beside those of the factors, to find a product's range with
POWER_STEPS = 4  # passes over a product that turn the guess of its row space to it
_flat = functools.partial(traverse_util.flatten_dict, sep="/")


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


def _of(default: Any, text: str, *rules: str) -> Any:
    """A constant of a `Rule`, and what it is; rules: those that alone have it."""
    return dataclasses.field(default=default, metadata={"text": text, "rules": rules})


@dataclasses.dataclass(frozen=True)
class Rule:
    """How n adapters become one: the name of a rule of `RULES`, and its constants."""

    name: str
    space: str = _of("factor", "factor: on A and B apart, or product: on B A")
    scale: float | None = _of(
        None, "factor of the result; default: 0.3 for task_arithmetic, else 1"
    )
    density: float = _of(0.2, "part of the entries that is kept", "ties", "dare")
    drop_into: str = _of("linear", "the rule for what is left, or ties", "dare")
    roots: bool = _of(False, "factor space: square roots of weights and scale (PEFT)")
    decay: float = _of(0.9, "what the average keeps of itself", "ema")
    fisher_floor: float = _of(1e-6, "added to every entry of F", "fisher")
    split: float = _of(0.5, "share of the singular values that is protected", "opcm")
    seed: int = _of(0, "of its masks", "dare")


class Entries(NamedTuple):
    """A matrix of each of n adapters, some rows at a time.

    at(i) -> n matrices (rows, columns), block i of each; rows beyond the last are zero;
    precision(i): alike, the precision of every entry (None: all are alike);
    blocks: how many there are; size: entries of one whole matrix.
    """

    at: Callable
    precision: Callable | None
    blocks: int
    size: int


def linear(
    entries: Entries, weights: jax.Array, rule: Rule, key: jax.Array
) -> Callable:
    """sum w_i delta_i / sum w_i."""
    return lambda i: _sum(entries.at(i), weights) / jnp.sum(weights)


def task_arithmetic(
    entries: Entries, weights: jax.Array, rule: Rule, key: jax.Array
) -> Callable:
    """sum w_i delta_i, times the scale (lambda). Source: Ilharco et al. 2023."""
    return lambda i: _sum(entries.at(i), weights)


def ties(entries: Entries, weights: jax.Array, rule: Rule, key: jax.Array) -> Callable:
    """Trim, elect a sign, average what agrees. Source: Yadav et al. 2023 (2306.01708).

    Of each matrix the largest `density` stay, in magnitude (those equal to the least of
    them too). The sign of an entry is that of the unweighted sum, + for 0; the entries
    of that sign are averaged: sum w_i delta_i / sum w_i over them (PEFT divides by their
    number).
    """
    least = _largest(entries, max(1, int(rule.density * entries.size)))

    def merged(i: jax.Array) -> jax.Array:
        pairs = zip(entries.at(i), least, strict=True)
        values = [jnp.where(jnp.abs(x) >= smallest, x, 0) for x, smallest in pairs]
        positive = sum(values) >= 0
        shares = [
            jnp.where(jnp.where(positive, x, -x) > 0, w, 0)
            for x, w in zip(values, weights, strict=True)
        ]
        total = sum(shares)
        return _sum(values, shares) / jnp.where(total > 0, total, 1)

    return merged


def dare(entries: Entries, weights: jax.Array, rule: Rule, key: jax.Array) -> Callable:
    """Keep each entry with probability `density`, divide by it, then linear or ties.

    The rescale is the paper's 1 / density (mergekit's is by L1 norms); ties then trims
    nothing more. Source: Yu et al. 2024 (arXiv 2311.03099).
    """

    def thinned(i: jax.Array) -> list[jax.Array]:
        values = entries.at(i)
        keys = jax.random.split(jax.random.fold_in(key, i), len(values))
        return [
            jnp.where(jax.random.bernoulli(k, rule.density, x.shape), x, 0)
            / rule.density
            for k, x in zip(keys, values, strict=True)
        ]

    left = entries._replace(at=thinned)
    whole = dataclasses.replace(rule, density=1.0)
    return ELEMENTWISE[rule.drop_into](left, weights, whole, key)


def fisher(
    entries: Entries, weights: jax.Array, rule: Rule, key: jax.Array
) -> Callable:
    """sum w_i F_i delta_i / sum w_i F_i. Source: Matena and Raffel 2022 (2111.09832)."""

    def merged(i: jax.Array) -> jax.Array:
        precisions = zip(entries.precision(i), weights, strict=True)
        shares = [f * w for f, w in precisions]
        return _sum(entries.at(i), shares) / sum(shares)

    return merged


def magmax(
    entries: Entries, weights: jax.Array, rule: Rule, key: jax.Array
) -> Callable:
    """The weighted entry of the largest magnitude. Source: Marczak et al. 2024."""

    def larger(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(jnp.abs(y) > jnp.abs(x), y, x)

    def merged(i: jax.Array) -> jax.Array:
        pairs = zip(entries.at(i), weights, strict=True)
        return functools.reduce(larger, [x * w for x, w in pairs])

    return merged


ELEMENTWISE = {
    rule.__name__: rule
    for rule in (linear, task_arithmetic, ties, dare, fisher, magmax)
} | {"ema": linear, "slao": linear}
RULES = (*ELEMENTWISE, "opcm")
SPACES = ("factor", "product")
SCALES = {"task_arithmetic": 0.3}
SIGNED = ("task_arithmetic", "magmax", "opcm")  # rules that take weights below 0


def merge(
    deltas: Sequence[Tree],
    rule: Rule,
    weights: Sequence[float] | None = None,
    fishers: Sequence[Tree] | None = None,
    rank: int | None = None,
    names: Sequence[str] | None = None,
) -> Tree:
    """One adapter made of `deltas` by `rule`; a single one of weight 1 is itself.

    weights: one an adapter, 1 where not given. fishers: for the rule `fisher`, trees of
    mean squared gradients shaped as the deltas. rank: of the result in product space, the
    largest one where not given; there the adapters' ranks may differ. names: what errors
    call the adapters. ema and slao take the adapters in their order, as `ema` and `slao` do
    one by one (in product space both are weighted averages of products). Of a single
    adapter nothing is trimmed or dropped, and its scale is 1 unless set: nothing
    interferes. Raises InputError for shapes that differ and values that are not finite,
    naming adapter and path, and for weights that a rule cannot take. All work is in
    functions jitted once for all modules of a shape; this one reads values on the host, so
    it is not to be jitted itself.
    """
    count = len(deltas)
    weights = [1.0] * count if weights is None else [float(w) for w in weights]
    _check(deltas, rule, weights, fishers, names)
    scale = rule.scale
    if scale is None:
        scale = 1.0 if count == 1 else SCALES.get(rule.name, 1.0)
    if count == 1:
        alone = "task_arithmetic" if rule.name in SIGNED else "linear"
        rule = dataclasses.replace(rule, name=alone)
    if rule.name in ("ema", "slao"):
        weights = _running(rule, count)
    modules, treedef = _modules(deltas)
    precisions = _modules(fishers)[0] if rule.name == "fisher" else [()] * len(modules)
    weights = jnp.asarray(weights, jnp.float32)
    if rule.name == "opcm":
        merged = _opcm(modules, weights, rule, rank)
    else:
        one = _in_factors if rule.space == "factor" else _in_product
        key = jax.random.key(rule.seed)
        # What is used here alone must not make another function to compile.
        rule = dataclasses.replace(rule, seed=0, scale=None)
        merged = [
            one(m, p, weights, jax.random.fold_in(key, number), rule, rank)
            for number, (m, p) in enumerate(zip(modules, precisions, strict=True))
        ]
    on_a, on_b = (1.0, scale) if rule.space == "product" else _sides(scale, rule)
    merged = [{"a": m["a"] * on_a, "b": m["b"] * on_b} for m in merged]
    return jax.tree.unflatten(treedef, merged)


@jax.jit
def slao(merged: Tree, tuned: Tree, number: jax.Array) -> Tree:
    """The merge after task `number` (from 1): its A; B_m + (B - B_m) / sqrt(number).

    merged: (A_m, B_m) before it; tuned: the adapter (A, B) of the task. Source: SLAO, by a
    third party's implementation that quotes the paper.
    """

    def module(old: Tree, new: Tree) -> Tree:
        b = old["b"] + (new["b"] - old["b"]) / jnp.sqrt(number)
        # The first B exactly, which old + (new - old) is not in float32.
        return {"a": new["a"], "b": jnp.where(number == 1, new["b"], b)}

    return jax.tree.map(module, merged, tuned, is_leaf=_is_module)


@jax.jit
def orthonormal(delta: Tree) -> Tree:
    """The adapter with the rows of every A made orthonormal; B as it is.

    Q R = A^T with diag(R) > 0, and A becomes Q^T: how SLAO begins a task.
    """

    def module(node: Tree) -> Tree:
        q, r = jnp.linalg.qr(node["a"].mT)
        sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
        return {"a": (q * sign[..., None, :]).mT, "b": node["b"]}

    return jax.tree.map(module, delta, is_leaf=_is_module)


@jax.jit
def ema(average: Tree, new: Tree, decay: float) -> Tree:
    """decay * average + (1 - decay) * new, entry by entry."""
    return jax.tree.map(lambda m, n: decay * m + (1 - decay) * n, average, new)


@jax.jit
def opcm_step(
    merged: Sequence[jax.Array],
    new: Sequence[jax.Array],
    normaliser: jax.Array,
    norm: jax.Array,
    split: float,
) -> tuple[list[jax.Array], jax.Array]:
    """Matrices of the next OPCM merge, and its normaliser lambda_t.

    merged, new: a matrix (..., p, q) for each module, the change of the weights so far and
    of the next task; normaliser: lambda_{t-1}, 1 before the second task; norm: what the
    result's is to be over all modules, the mean norm of all task vectors, `new` included.

    With U S V^T the singular value decomposition of `merged`, the next task's
    U^T new V loses its diagonal, and the block of the first k directions, whose cumulative
    S is at most `split` of the whole: that is (lambda_{t-1} merged + cleaned) / lambda_t.
    Directions of singular value 0 have no basis of their own, so nothing is taken from
    them, where the release takes the diagonal in whichever basis its routine gives.
    Source: Tang et al. 2025 (arXiv 2501.09522); strict split as its release (FusionBench).
    """

    def cleaned(old: jax.Array, task: jax.Array) -> jax.Array:
        u, s, vt = jnp.linalg.svd(old, full_matrices=False)
        real = s > s[0] * max(old.shape) * jnp.finfo(s.dtype).eps
        inside = jnp.cumsum(s) <= split * jnp.sum(s)
        # The first direction beyond the split, and all after it, are outside.
        taken = jnp.outer(inside, inside) | jnp.eye(len(s), dtype=bool)
        taken &= jnp.outer(real, real)
        return task - _mm(u, jnp.where(taken, _mm(_mm(u.T, task), vt.T), 0), vt)

    def total(old: jax.Array, task: jax.Array) -> jax.Array:
        clean = jnp.vectorize(cleaned, signature="(p,q),(p,q)->(p,q)")
        return normaliser * old + clean(old, task)

    sums = [total(old, task) for old, task in zip(merged, new, strict=True)]
    # Where nothing has moved yet, nothing is divided.
    following = jnp.where(norm > 0, optax.tree.norm(sums) / norm, 1)
    return [x / following for x in sums], following


def _running(rule: Rule, count: int) -> list[float]:
    """The weights of adapters in a running average, each taken up at its rate."""
    weights = [1.0]
    for number in range(2, count + 1):
        rate = 1 - rule.decay if rule.name == "ema" else number**-0.5
        weights = [w * (1 - rate) for w in weights] + [rate]
    return weights


def _opcm(
    modules: list[tuple[Tree, ...]], weights: jax.Array, rule: Rule, rank: int | None
) -> list[Tree]:
    """OPCM over adapters in their order, on A and B or in the products' common basis."""
    split = [_apart(m) if rule.space == "factor" else _cores(m) for m in modules]
    matrices = [m for found, _ in split for m in found]
    count = len(modules[0])
    tasks = [[m[i] * weights[i] for m in matrices] for i in range(count)]
    norms = [optax.tree.norm(task) for task in tasks]
    merged, normaliser = tasks[0], jnp.float32(1)
    for i in range(1, count):
        mean = sum(norms[: i + 1]) / (i + 1)
        merged, normaliser = opcm_step(merged, tasks[i], normaliser, mean, rule.split)
    merged = iter(merged)
    if rule.space == "factor":
        return [{"a": next(merged), "b": next(merged)} for _ in modules]
    return [
        _truncated(_mm(left, next(merged)), right, _rank(m, rank))
        for m, (_, (left, right)) in zip(modules, split, strict=True)
    ]


@functools.partial(jax.jit, static_argnames=("rule", "rank"))
def _in_factors(
    module: tuple[Tree, ...],
    precisions: tuple[Tree, ...],
    weights: jax.Array,
    key: jax.Array,
    rule: Rule,
    rank: int | None,
) -> Tree:
    """The rule on A and on B of one module, each layer by itself."""

    def side(name: str, number: int, weights: jax.Array) -> jax.Array:
        values = jnp.stack([m[name] for m in module])
        shape = values.shape[1:]
        stacks = [_layers(values)]
        if precisions:
            stacks.append(_layers(jnp.stack([p[name] for p in precisions])))

        def layer(args: tuple) -> jax.Array:
            key, values, *rest = args
            precise = (lambda i: list(rest[0] + rule.fisher_floor)) if rest else None
            entries = Entries(lambda i: list(values), precise, 1, values[0].size)
            return ELEMENTWISE[rule.name](entries, weights, rule, key)(0)

        keys = jax.random.split(jax.random.fold_in(key, number), len(stacks[0]))
        return jax.lax.map(layer, (keys, *stacks)).reshape(shape)

    on_a, on_b = _sides(weights, rule)
    if rule.name == "slao":
        on_a = jnp.zeros_like(on_a).at[-1].set(1)
    return {"a": side("a", 0, on_a), "b": side("b", 1, on_b)}


@functools.partial(jax.jit, static_argnames=("rule", "rank"))
def _in_product(
    module: tuple[Tree, ...],
    precisions: tuple[Tree, ...],
    weights: jax.Array,
    key: jax.Array,
    rule: Rule,
    rank: int | None,
) -> Tree:
    """The rule on B A of one module, each layer by itself, and its best rank-r factors.

    A sum of products has rank sum r_i, so linear rules are exact. The others work on
    entries, some rows at a time, and their result is met only in products with thin
    matrices. What the precision of an entry of B A is follows from those of A and B, to
    first order: 1 / (B^2 (1 / F_A) + (1 / F_B) A^2).
    """
    rank = _rank(module, rank)
    if ELEMENTWISE[rule.name] in (linear, task_arithmetic):
        left, right = _concatenated(module)
        if ELEMENTWISE[rule.name] is linear:
            weights = weights / jnp.sum(weights)
        share = [
            jnp.full(m["b"].shape[-1], w) for m, w in zip(module, weights, strict=True)
        ]
        return _truncated(left * jnp.concatenate(share), right, rank)

    def layer(args: tuple) -> tuple[jax.Array, jax.Array]:
        key, factors, floors = args
        out, width = factors[0]["b"].shape[0], factors[0]["a"].shape[1]
        rows = min(ROWS, out)
        blocks = -(-out // rows)

        def block(b: jax.Array, i: jax.Array) -> jax.Array:
            padded = jnp.pad(b, ((0, blocks * rows - out), (0, 0)))
            return jax.lax.dynamic_slice_in_dim(padded, i * rows, rows)

        def at(i: jax.Array) -> list[jax.Array]:
            return [_mm(block(f["b"], i), f["a"]) for f in factors]

        def precision(i: jax.Array) -> list[jax.Array]:
            variances = [
                _mm(block(f["b"], i) ** 2, 1 / p["a"])
                + _mm(block(1 / p["b"], i), f["a"] ** 2)
                for f, p in zip(factors, floors, strict=True)
            ]
            return [1 / jnp.maximum(v, 1e-30) for v in variances]

        entries = Entries(at, precision, blocks, out * width)
        merged = ELEMENTWISE[rule.name](entries, weights, rule, key)
        start = jnp.concatenate([f["a"] for f in factors]).T
        return _range(merged, blocks, rows, out, start)

    layers = jax.tree.map(lambda x: _layers(x[None])[:, 0], module)
    floors = jax.tree.map(
        lambda x: _layers(x[None])[:, 0] + rule.fisher_floor, precisions
    )
    keys = jax.random.split(key, layers[0]["a"].shape[0])
    left, right = jax.lax.map(layer, (keys, layers, floors))
    lead = module[0]["a"].shape[:-2]
    left, right = (x.reshape(*lead, *x.shape[1:]) for x in (left, right))
    return _truncated(left, right, rank)


def _range(
    at: Callable, blocks: int, rows: int, out: int, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """left (out, k), right (in, k): left right^T is a matrix M near its best rank.

    at(i) -> the rows of block i of M; start (in, k): a guess of its row space, which gets
    `OVERSAMPLE` random columns beside it and is turned by M^T M. Source: subspace
    iteration, Halko, Martinsson and Tropp 2011.
    """
    width = start.shape[0]
    more = jax.random.normal(jax.random.key(0), (width, OVERSAMPLE), start.dtype)
    x = jnp.linalg.qr(jnp.concatenate([start, more], 1)).Q

    def turned(_: int, x: jax.Array) -> jax.Array:
        def block(i: jax.Array, total: jax.Array) -> jax.Array:
            matrix = at(i)
            return total + _mm(matrix.T, _mm(matrix, x))

        total = jax.lax.fori_loop(0, blocks, block, jnp.zeros_like(x))
        return jnp.linalg.qr(total).Q

    x = jax.lax.fori_loop(0, POWER_STEPS, turned, x)
    parts = jax.lax.map(lambda i: _mm(at(i), x), jnp.arange(blocks))
    left = jnp.linalg.qr(parts.reshape(blocks * rows, -1)[:out]).Q
    parts = jnp.pad(left, ((0, blocks * rows - out), (0, 0))).reshape(blocks, rows, -1)
    right = jax.lax.fori_loop(
        0,
        blocks,
        lambda i, total: total + _mm(at(i).T, parts[i]),
        jnp.zeros((width, left.shape[1]), left.dtype),
    )
    return left, right


@functools.partial(jax.jit, static_argnames="rank")
def _truncated(left: jax.Array, right: jax.Array, rank: int) -> Tree:
    """The best approximation of left right^T of a rank, as {a, b} of equal norms.

    By a QR of each side (..., out, k), (..., in, k) and the singular values of a k x k
    matrix.
    """
    q_left, r_left = jnp.linalg.qr(left)
    q_right, r_right = jnp.linalg.qr(right)
    u, s, vt = jnp.linalg.svd(_mm(r_left, r_right.mT), full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    b = _mm(q_left, u[..., :rank] * root[..., None, :])
    a = _mm(root[..., None] * vt[..., :rank, :], q_right.mT)
    spare = rank - root.shape[-1]
    if spare > 0:
        none = [(0, 0)] * (b.ndim - 2)
        b = jnp.pad(b, [*none, (0, 0), (0, spare)])
        a = jnp.pad(a, [*none, (0, spare), (0, 0)])
    return {"a": a, "b": b}


def _concatenated(module: tuple[Tree, ...]) -> tuple[jax.Array, jax.Array]:
    """left (..., out, sum r), right (..., in, sum r) of adapters side by side."""
    left = jnp.concatenate([m["b"] for m in module], -1)
    return left, jnp.concatenate([m["a"] for m in module], -2).mT


def _apart(module: tuple[Tree, ...]) -> tuple[list[jax.Array], None]:
    """A and B of n adapters, each (n, ...)."""
    return [jnp.stack([m[side] for m in module]) for side in ("a", "b")], None


@jax.jit
def _cores(
    module: tuple[Tree, ...],
) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array]]:
    """[cores (n, ..., p, q)], (left, right): B_i A_i = left cores[i] right^T.

    left and right have orthonormal columns, so what turns with its bases (a singular
    value decomposition, a norm) can be done on the cores.
    """
    left, right = _concatenated(module)
    (q_left, r_left), (q_right, r_right) = jnp.linalg.qr(left), jnp.linalg.qr(right)
    ends = np.cumsum([m["b"].shape[-1] for m in module])[:-1]
    pairs = zip(jnp.split(r_left, ends, -1), jnp.split(r_right, ends, -1), strict=True)
    return [jnp.stack([_mm(x, y.mT) for x, y in pairs])], (q_left, q_right)


def _largest(entries: Entries, kept: int) -> jax.Array:
    """The `kept`-th largest magnitude (n,) of each matrix, found by bisection.

    Magnitudes are ordered as their bits are, read as integers, so 31 counts are exact.
    """

    def bits(values: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(jnp.abs(values), jnp.int32)

    def above(i: jax.Array, least: jax.Array) -> jax.Array:
        pairs = zip(entries.at(i), least, strict=True)
        return jnp.stack([jnp.sum(bits(x) >= m, dtype=jnp.int32) for x, m in pairs])

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        enough = kept <= jax.lax.fori_loop(
            0, entries.blocks, lambda i, n: n + above(i, middle), jnp.zeros_like(low)
        )
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low = jnp.zeros(len(jax.eval_shape(entries.at, 0)), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, low + bits(jnp.float32(jnp.inf))))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def check(rule: Rule) -> None:
    """Raise InputError for a rule whose constants are none."""
    for field, value, known in (
        ("rule", rule.name, RULES),
        ("space", rule.space, SPACES),
        ("drop_into", rule.drop_into, ("linear", "ties")),
    ):
        if value not in known:
            raise aim_jax.InputError(
                f"{field}: no '{value}'; there are {', '.join(known)}"
            )
    if not 0 < rule.density <= 1:
        raise aim_jax.InputError(f"density {rule.density} must be above 0, at most 1")
    if not 0 < rule.fisher_floor < math.inf:
        raise aim_jax.InputError(f"fisher_floor {rule.fisher_floor} must be above 0")
    unrooted = ("ema", "slao", "opcm")
    if rule.roots and (rule.space == "product" or rule.name in unrooted):
        raise aim_jax.InputError(
            "roots: square roots of weights are for space factor, and there not for"
            f" {', '.join(unrooted)}"
        )
    if rule.scale is not None and not math.isfinite(rule.scale):
        raise aim_jax.InputError(f"scale {rule.scale} must be finite")
    for field in ("decay", "split"):
        value = getattr(rule, field)
        if not 0 <= value <= 1:
            raise aim_jax.InputError(f"{field} {value} must be at least 0, at most 1")


def _check(
    deltas: Sequence[Tree],
    rule: Rule,
    weights: list[float],
    fishers: Sequence[Tree] | None,
    names: Sequence[str] | None,
) -> None:
    """Raise InputError for what `merge` cannot merge."""
    check(rule)
    if not deltas or len(weights) != len(deltas):
        raise aim_jax.InputError(
            f"{len(weights)} weights for {len(deltas)} adapters; give one for each"
        )
    if rule.name in ("ema", "slao") and set(weights) != {1.0}:
        raise aim_jax.InputError(f"{rule.name} weighs by order; it takes no weights")
    least = -math.inf if rule.name in SIGNED else 0
    wrong = [w for w in weights if not least < w < math.inf]
    if wrong:
        raise aim_jax.InputError(
            f"weight {wrong[0]} must be finite"
            + ("" if least else f" and above 0 for {rule.name}")
        )
    if rule.name == "fisher" and len(fishers or ()) != len(deltas):
        raise aim_jax.InputError("fisher needs the squared gradients of every adapter")
    count = len(deltas)
    names = names or [f"adapter {number} of {count}" for number in range(1, count + 1)]
    for number, (name, delta) in enumerate(zip(names, deltas, strict=True)):
        _check_tree(name, delta, names[0], deltas[0], rule.space == "product")
        if rule.name == "fisher":
            _check_tree(f"fisher of {name}", fishers[number], name, delta, False)


def _check_tree(name: str, tree: Tree, other: str, like: Tree, ranks: bool) -> None:
    """Raise InputError for shapes that are not those of `like`, and infinite values.

    name, other: what the trees are called; ranks: whether a rank of its own is as good.
    """

    def shapes(tree: Tree) -> dict[str, list]:
        found = {path: list(x.shape) for path, x in sorted(_flat(tree).items())}
        for path, shape in found.items():
            if ranks:
                shape[-2 if path.endswith("a") else -1] = "r"
        return found

    ours, theirs = shapes(tree), shapes(like)
    for path in sorted(ours.keys() ^ theirs.keys()):
        lacks, has = (name, other) if path in theirs else (other, name)
        raise aim_jax.InputError(f"{lacks}: no {path}, which {has} has")
    for path, shape in ours.items():
        if shape != theirs[path]:
            raise aim_jax.InputError(
                f"{name}: {path} is {_text(shape)}, but {_text(theirs[path])} in {other}"
            )
    for path, good in _flat(jax.device_get(_finite(tree))).items():
        if not good:
            raise aim_jax.InputError(f"{name}: values that are not finite in {path}")


def _text(shape: list) -> str:
    return f"({', '.join(map(str, shape))})"


@jax.jit
def _finite(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def _modules(trees: Sequence[Tree]) -> tuple[list[tuple[Tree, ...]], Any]:
    """The modules {a, b} of n trees, n to each module, and the trees' structure."""
    flat = [jax.tree.flatten(tree, is_leaf=_is_module) for tree in trees]
    return list(zip(*(modules for modules, _ in flat), strict=True)), flat[0][1]


def _is_module(node: Any) -> bool:
    return isinstance(node, dict) and "a" in node


def _rank(module: tuple[Tree, ...], rank: int | None) -> int:
    return rank or max(m["b"].shape[-1] for m in module)


def _sides(weights: Any, rule: Rule) -> tuple[Any, Any]:
    """What weights (or a scale) are on A and on B."""
    if not rule.roots:
        return weights, weights
    root = jnp.sqrt(jnp.abs(weights))
    return jnp.where(jnp.asarray(weights) < 0, -root, root), root


def _layers(values: jax.Array) -> jax.Array:
    """(n, ..., rows, columns) as (layers, n, rows, columns)."""
    count, *_, rows, columns = values.shape
    return values.reshape(count, -1, rows, columns).swapaxes(0, 1)


def _sum(values: Sequence[jax.Array], shares: Sequence[jax.Array]) -> jax.Array:
    """The weighted sum; no matrix product, which could round its inputs."""
    return sum(x * w for x, w in zip(values, shares, strict=True))


def _mm(*factors: jax.Array) -> jax.Array:
    """The product of matrices in full float32, on every device."""
    return functools.reduce(functools.partial(jnp.matmul, precision="highest"), factors)
