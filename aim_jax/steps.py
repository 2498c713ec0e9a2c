"""The compiled computations: train step, probe, rehearsal, validation loss.

All are pure functions of (frozen base, state, batch). A batch carries a weight for every
target token, so every way to average (over tokens, over micro-batches) is data. Of other
devices that share a batch a step knows by its `axis` alone: sums, lengths, row numbers.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from aim_jax import config, lora, methods, parallel
from aim_jax.data import batches
from aim_jax.models import layers

Tree = Any
Batch = dict[str, jax.Array]
Axis = parallel.Axis | None


class State(NamedTuple):
    """What training changes.

    delta: the adapter; adam: its moments and the count of all updates, rehearsal
    included; step: updates on the task's own batches; total: how many there will be;
    key: raw random key (2,) of the task, for dropout; carry: what the method carries from
    step to step (`methods.Method`).
    """

    delta: Tree
    adam: Tree
    step: jax.Array
    total: jax.Array
    key: jax.Array
    carry: Tree = ()


class Steps(NamedTuple):
    """The pure functions that `parallel.compile` makes fast.

    train(base, state, memo, batch, chunk) -> (state, measures): one optimizer step; the
        measures are float32 scalars loss, grad_norm, lr, movement (mean |change| of an
        entry), distance (norm of the change), for a method that has one the penalty, which
        `loss` does not hold, and with a chunk, which may be None, history: the probe after it
    probe(base, state, memo, chunk) -> loss of the first batch of a chunk, float32; 0, and
        nothing is run, where that is empty
    rehearse(base, state, memo, chunk, count) -> (state, losses): the first `count` batches
    validate(base, adapter, batch) -> weighted sum of the loss over a batch, float32
    squares(base, state, memo, batch) -> sum over rows of the squared gradient of a row's
        log-likelihood, a tree like the delta; no dropout

    memo: the arrays of the method's memo. A batch has leaves (parts, b, length), a chunk
    (steps, parts, b, length). Every function takes `axis`, None where it sees all rows.
    """

    train: Callable
    probe: Callable
    rehearse: Callable
    validate: Callable
    squares: Callable


def init(
    delta: Tree,
    total: int,
    key: jax.Array,
    method: methods.Method | None = None,
) -> State:
    """A fresh state around `delta` for a task of `total` steps."""
    return State(
        delta,
        optax.scale_by_adam().init(delta),
        jnp.zeros((), jnp.int32),
        jnp.asarray(total, jnp.int32),
        jax.random.key_data(key),
        method.carry(delta) if method and method.carry else (),
    )


def learning_rate(step: jax.Array, total: jax.Array, cfg: config.Train) -> jax.Array:
    """Rate of the step after `step` others: linear warm-up from 0, then linear to 0.

    As the release does (semantics.md 2.2): the first step has rate 0.
    """
    warmup = cfg.warmup_steps
    rise = step / max(1, warmup)
    fall = (total - step) / jnp.maximum(1, total - warmup)
    return cfg.learning_rate * jnp.where(step < warmup, rise, jnp.maximum(0.0, fall))


def make(model: Any, cfg: config.Config, method: methods.Method) -> Steps:
    """The steps of one model under one config, with the method's part in them."""

    def compose(delta: Tree, memo: Tree) -> Tree:
        return method.compose(delta, memo) if method.compose else delta

    def loss(
        adapter: Tree,
        base: Tree,
        batch: Batch,
        key: jax.Array | None,
        magnitudes: Tree | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Weighted sum of the token losses, and the count of target tokens."""
        bound = lora.bind(adapter, cfg.lora, train=key is not None)
        if magnitudes is not None:

            def real(path: str) -> jax.Array:
                return model.real(path, batch).astype(jnp.float32)

            bound = lora.measured(bound, magnitudes, real)
        logits = model.apply(
            {"params": base, "lora": bound},
            batch,
            rngs={} if key is None else {"dropout": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["targets"]
        )
        weights = batch["weights"]
        return jnp.sum(losses * weights), jnp.sum(weights > 0)

    def key_of(state: State, batch: Batch, axis: Axis) -> jax.Array:
        first = axis.index() * batch["inputs"].shape[-2] if axis else 0
        data = jnp.append(state.key, jnp.uint32(first))
        key = jax.random.wrap_key_data(data, impl=layers.HASH)
        return jax.random.fold_in(key, state.adam.count)

    def summed(
        f: Callable, zero: Tree, batch: Batch, axis: Axis, blank: bool = False
    ) -> Tree:
        """The sum of `f(part, number)` over the parts of a batch and over the devices.

        Each part is cut to the smallest bucket that holds its rows, on whichever device they
        are; an empty one of several costs nothing, nor does a `blank` batch.
        """
        full, least = batch["inputs"].shape[-1], batch["targets"].shape[-1]
        sizes = batches.cuts(cfg.data.buckets, full, least)

        def cut_to(size: int) -> Callable:
            def run(part: Batch, number: jax.Array) -> Tree:
                # A decoder's rows end in the last column, an encoder's begin in the first.
                first = jnp.where(part["mask"][:, -1].any(), full - size, 0)
                cut = {
                    name: jax.lax.dynamic_slice_in_dim(part[name], first, size, 1)
                    for name in ("inputs", "mask", "segments")
                    if name in part
                }
                return f(part | cut, number)

            return run

        limits, branches = sizes, [cut_to(size) for size in sizes]
        if blank or batch["inputs"].shape[0] > 1:
            limits, branches = [0, *limits], [lambda *part: zero, *branches]

        used = batch["mask"].sum(-1).max(-1)
        if axis:
            used = axis.max(used)
        chosen = jnp.sum(used[:, None] > jnp.array(limits), -1)

        def add(total: Tree, item: tuple[jax.Array, ...]) -> tuple[Tree, None]:
            branch, part, number = item
            value = jax.lax.switch(branch, branches, part, number)
            return jax.tree.map(jnp.add, total, value), None

        numbers = jnp.arange(len(used))
        total, _ = jax.lax.scan(add, zero, (chosen, batch, numbers))
        return axis.sum(total) if axis else total

    def forward(
        adapter: Tree,
        base: Tree,
        batch: Batch,
        key: jax.Array | None,
        axis: Axis,
        blank: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """`loss` of a whole batch."""

        def of(part: Batch, number: jax.Array) -> tuple[jax.Array, jax.Array]:
            own = None if key is None else jax.random.fold_in(key, number)
            return loss(adapter, base, part, own)

        return summed(of, (jnp.float32(0), jnp.int32(0)), batch, axis, blank)

    def gradients(
        base: Tree, state: State, memo: Tree, batch: Batch, axis: Axis
    ) -> tuple[jax.Array, Tree, Tree]:
        """Mean loss, its gradient and the magnitudes, over a batch."""
        key = key_of(state, batch, axis)
        zeros = jax.tree.map(jnp.zeros_like, state.delta)
        silent = lora.units(state.delta) if method.magnitudes else None

        def of(part: Batch, number: jax.Array) -> tuple[tuple, Tree]:
            def composed(delta: Tree, magnitudes: Tree) -> tuple[jax.Array, jax.Array]:
                adapter = compose(delta, memo)
                step_key = jax.random.fold_in(key, number)
                return loss(adapter, base, part, step_key, magnitudes)

            graded = jax.value_and_grad(composed, (0, 1), has_aux=True)
            return graded(state.delta, silent)

        zero = ((jnp.float32(0), jnp.int32(0)), (zeros, silent))
        (total, count), (grads, magnitudes) = summed(of, zero, batch, axis)
        count = jnp.maximum(count, 1)
        return total / count, jax.tree.map(lambda g: g / count, grads), magnitudes

    def update(
        state: State, grads: Tree, magnitudes: Tree, memo: Tree, rehearsal: bool
    ) -> tuple[State, dict[str, jax.Array]]:
        """One clipped Adam update at the rate of the state's step."""
        if method.gradients:
            grads, carry = method.gradients(state, grads, magnitudes, memo, rehearsal)
            state = state._replace(carry=carry)
        norm = optax.tree.norm(grads)
        # As torch clips: 1e-6 in the divisor.
        clip = jnp.minimum(1.0, cfg.train.clip_norm / (norm + 1e-6))
        grads = jax.tree.map(lambda g: g * clip, grads)
        rate = learning_rate(state.step, state.total, cfg.train)
        changes, adam = _adam(grads, state.adam)
        delta = jax.tree.map(
            lambda p, c: p - rate * (c + cfg.train.weight_decay * p),
            state.delta,
            changes,
        )
        measures = {"grad_norm": norm, "lr": rate}
        return state._replace(delta=delta, adam=adam), measures

    def train(
        base: Tree,
        state: State,
        memo: Tree,
        batch: Batch,
        chunk: Batch | None = None,
        *,
        axis: Axis = None,
    ) -> tuple[State, dict[str, jax.Array]]:
        value, grads, magnitudes = gradients(base, state, memo, batch, axis)
        extra = {}
        if method.penalty:
            extra["penalty"], grads = _add(method.penalty, state.delta, memo, grads)
        after, measures = update(state, grads, magnitudes, memo, rehearsal=False)
        change = jax.tree.map(jnp.subtract, after.delta, state.delta)
        size = sum(x.size for x in jax.tree.leaves(change))
        moved = {
            "movement": optax.tree.norm(change, ord=1) / size,
            "distance": optax.tree.norm(change),
        }
        measures = {"loss": value, **moved, **measures, **extra}
        after = after._replace(step=state.step + 1)
        if chunk is not None:
            measures["history"] = probe(base, after, memo, chunk, axis=axis)
        return after, measures

    def probe(
        base: Tree, state: State, memo: Tree, chunk: Batch, *, axis: Axis = None
    ) -> jax.Array:
        batch = jax.tree.map(lambda x: x[0], chunk)
        key = key_of(state, batch, axis) if method.probe_dropout else None
        adapter = compose(state.delta, memo)
        total, count = forward(adapter, base, batch, key, axis, blank=True)
        return total / jnp.maximum(count, 1)

    def rehearse(
        base: Tree,
        state: State,
        memo: Tree,
        chunk: Batch,
        count: jax.Array,
        *,
        axis: Axis = None,
    ) -> tuple[State, jax.Array]:
        def body(
            i: jax.Array, carry: tuple[State, jax.Array]
        ) -> tuple[State, jax.Array]:
            state, losses = carry
            batch = jax.tree.map(lambda x: x[i], chunk)
            value, grads, magnitudes = gradients(base, state, memo, batch, axis)
            if method.rehearsal_penalty:
                _, grads = _add(method.rehearsal_penalty, state.delta, memo, grads)
            state, _ = update(state, grads, magnitudes, memo, rehearsal=True)
            return state, losses.at[i].set(value)

        losses = jnp.zeros(chunk["inputs"].shape[0], jnp.float32)
        loop = axis.loop if axis else jax.lax.fori_loop
        return loop(0, count, body, (state, losses))

    def validate(
        base: Tree, adapter: Tree, batch: Batch, *, axis: Axis = None
    ) -> jax.Array:
        return forward(adapter, base, batch, None, axis)[0]

    def squares(
        base: Tree, state: State, memo: Tree, batch: Batch, *, axis: Axis = None
    ) -> Tree:
        def likelihood(delta: Tree, row: Batch) -> jax.Array:
            return loss(compose(delta, memo), base, row, None)[0]

        def of(part: Batch, number: jax.Array) -> Tree:
            rows = jax.tree.map(lambda x: x[:, None], part)
            grads = jax.vmap(jax.grad(likelihood), (None, 0))(state.delta, rows)
            return jax.tree.map(lambda g: jnp.sum(g**2, 0), grads)

        zero = jax.tree.map(jnp.zeros_like, state.delta)
        return summed(of, zero, batch, axis)

    return Steps(train, probe, rehearse, validate, squares)


def _add(
    penalty: Callable, delta: Tree, memo: Tree, grads: Tree
) -> tuple[jax.Array, Tree]:
    """The penalty, and the gradients with its own added."""
    value, more = jax.value_and_grad(penalty)(delta, memo)
    return value, jax.tree.map(jnp.add, grads, more)


def _adam(grads: Tree, adam: Tree, b1=0.9, b2=0.999, eps=1e-8) -> tuple[Tree, Tree]:
    """Adam's change at rate 1, and the new moments. Source: Kingma and Ba 2015.

    As optax.scale_by_adam but for its 1 - b**count, whose rounding in float32 shortens
    steps by up to 1e-5; the PyTorch release has it in float64.
    """
    count = adam.count + 1
    unbias1, unbias2 = (-jnp.expm1(count * math.log(b)) for b in (b1, b2))
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, adam.mu, grads)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, adam.nu, grads)
    changes = jax.tree.map(
        lambda m, v: m / unbias1 / (jnp.sqrt(v / unbias2) + eps), mu, nu
    )
    return changes, adam._replace(count=count, mu=mu, nu=nu)
