"""The methods that merge: their hooks by formula, and a run of one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import test_run
from test_fusion import adapter, close, elected, matrices, trimmed

import aim_jax
from aim_jax import config, fusion, methods, run
from aim_jax.methods import ema, fisher, opcm, sequential, slao, task_arithmetic, ties


class State(NamedTuple):
    """As much of `steps.State` as the hooks know."""

    delta: Any


def tools_of(number, fisher=None):
    """Tools that know the number of the task."""
    return methods.Tools(number, 0, None, None, None, fisher)


def stream(method, tuned, fisher=None):
    """The fresh adapter, those that tasks begin with, and those that they leave.

    tuned: what training gives.
    """
    fresh = adapter(0)
    fresh = jax.tree.map_with_path(
        lambda path, x: 0 * x if path[-1].key == "b" else x, fresh
    )
    state, memo = State(fresh), method.start(fresh, len(tuned))
    begun, done = [], []
    for number, delta in enumerate(tuned):
        tools = tools_of(number, fisher)
        state, memo = method.before_task(tools, state, memo)
        begun.append(state.delta)
        state, memo = method.after_task(tools, State(delta), memo)
        made = method.adapter(state.delta, memo, number) if method.adapter else None
        done.append(made or state.delta)
    return fresh, begun, done


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_task_arithmetic():
    """theta_0 + 0.3 sum (theta_i - theta_0), every task from theta_0."""
    tuned = [adapter(seed) for seed in (1, 2, 3)]
    method = task_arithmetic.make(task_arithmetic.Options())
    fresh, begun, done = stream(method, tuned)
    for tree in begun:
        same(tree, fresh)
    same(done[0], tuned[0])
    origin = matrices([fresh], "factor")
    found = matrices(tuned, "factor")
    for count in (2, 3):
        expected = {
            k: o[0] + 0.3 * (found[k][:count] - o).sum(0) for k, o in origin.items()
        }
        close(done[count - 1], expected, "factor")


def test_ties_in_product_space():
    tuned = [adapter(seed, out=6) for seed in (1, 2)]
    method = ties.make(ties.Options(space="product", density=0.5, scale=0.7))
    fresh = adapter(0, out=6)
    memo = method.start(fresh, 2)
    for number, delta in enumerate(tuned):
        state, memo = method.after_task(tools_of(number), State(delta), memo)
    for name, x in matrices(tuned, "product").items():
        u, s, vt = np.linalg.svd(0.7 * elected(trimmed(x, 0.5), (1, 1)))
        expected = (u[:, :3] * s[:3]) @ vt[:3]
        found = matrices([state.delta], "product")[name][0]
        np.testing.assert_allclose(found, expected, atol=5e-5)


@pytest.mark.parametrize("space", fusion.SPACES)
def test_fisher(space):
    """Each adapter is weighted by the squared gradients at it, measured once."""
    tuned = [adapter(seed) for seed in (1, 2, 3)]
    asked = []

    def squares(state, memo, rows):
        asked.append((state.delta, rows))
        return jax.tree.map(lambda x: 1e-3 * x**4, state.delta)

    method = fisher.make(fisher.Options(space=space, fisher_rows=7))
    fresh, _, done = stream(method, tuned, squares)
    assert [count for _, count in asked] == [7] * 3
    same([delta for delta, _ in asked], tuned)
    changes, rule = tuned, fusion.Rule("fisher", space)
    if space == "factor":
        changes = [jax.tree.map(jnp.subtract, t, fresh) for t in tuned]
    squared = [jax.tree.map(lambda x: 1e-3 * x**4, t) for t in tuned]
    merged = fusion.merge(changes, rule, fishers=squared)
    if space == "factor":
        merged = jax.tree.map(jnp.add, fresh, merged)
        expected = {}
        for name, x in matrices(tuned, space).items():
            share = 1e-3 * x**4 + 1e-6
            expected[name] = (share * x).sum(0) / share.sum(0)
        close(done[2], expected, space, 1e-4)
    same(done[2], merged)


def test_opcm_starts_from_the_change():
    tuned = [adapter(seed) for seed in (1, 2)]
    fresh, _, done = stream(opcm.make(opcm.Options(split=0.4)), tuned)
    changes = [jax.tree.map(jnp.subtract, t, fresh) for t in tuned]
    expected = fusion.merge(changes, fusion.Rule("opcm", split=0.4))
    same(done[1], jax.tree.map(jnp.add, fresh, expected))


@pytest.mark.parametrize("space", fusion.SPACES)
def test_slao(space):
    """A from the last task's own by QR, B its own; the merge by 1 / sqrt(i)."""
    tuned = [adapter(seed) for seed in (1, 2, 3)]
    fresh, begun, done = stream(slao.make(slao.Options(space=space)), tuned)
    same(begun[0], fresh)
    same(done[0], tuned[0])
    for number in (1, 2):
        before = tuned[number - 1]["last"]["v"]
        found = begun[number]["last"]["v"]
        same(found["b"], before["b"])
        q, r = np.linalg.qr(np.float64(before["a"]).T)
        expected = (q * np.sign(np.diag(r))).T
        np.testing.assert_allclose(found["a"], expected, atol=1e-5)
    if space == "factor":
        same(done[2]["layers"]["q"]["a"], tuned[2]["layers"]["q"]["a"])
        b = [np.float64(t["layers"]["q"]["b"]) for t in tuned]
        expected = b[0] + (b[1] - b[0]) / 2**0.5
        expected += (b[2] - expected) / 3**0.5
        np.testing.assert_allclose(done[2]["layers"]["q"]["b"], expected, atol=1e-5)
    else:
        for name, x in matrices(tuned[:2], "product").items():
            mean = x[0] + (x[1] - x[0]) / 2**0.5
            u, s, vt = np.linalg.svd(mean, full_matrices=False)
            found = matrices([done[1]], "product")[name][0]
            np.testing.assert_allclose(found, (u[:, :3] * s[:3]) @ vt[:3], atol=5e-5)


@pytest.mark.parametrize("space", fusion.SPACES)
def test_ema(space):
    """Training goes on from the adapter, and the average is evaluated."""
    method = ema.make(ema.Options(space=space, decay=0.8, every=2))
    trees = [adapter(seed) for seed in range(5)]
    memo = method.start(trees[0], 1)
    for step, delta in enumerate(trees[1:], 1):
        signals = methods.Signals(step, 4, 0.0, 0.0, 0.0, 0.0, None)
        state, memo, record = method.after_step(None, State(delta), memo, signals)
        assert state.delta is delta and record is None
    made = method.adapter(state.delta, memo, 0)
    if space == "factor":
        for k, x in matrices(trees, space).items():
            expected = 0.8 * (0.8 * x[0] + 0.2 * x[2]) + 0.2 * x[4]
            found = matrices([made], space)[k][0]
            np.testing.assert_allclose(found, expected, atol=1e-5)
    else:
        rule = fusion.Rule("ema", space, decay=0.8)
        expected = fusion.merge([trees[0], trees[2]], rule)
        same(made, fusion.merge([expected, trees[4]], rule))


def test_ema_of_a_task_with_fewer_steps_than_between_two_averages():
    method = ema.make(ema.Options(decay=0.8, every=8))
    first, last = adapter(0), adapter(1)
    memo = method.start(first, 1)
    for step in (1, 2, 3):
        signals = methods.Signals(step, 3, 0.0, 0.0, 0.0, 0.0, None)
        state, memo, _ = method.after_step(None, State(last), memo, signals)
    same(method.adapter(state.delta, memo, 0), fusion.ema(first, last, 0.8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (ties.Options(density=0.0), "density 0.0 must be above 0"),
        (ties.Options(scale=float("nan")), "scale nan must be finite"),
        (ema.Options(decay=2.0), "decay 2.0 must be at least 0"),
        (opcm.Options(split=-0.1), "split -0.1 must be at least 0"),
    ],
)
def test_constants_that_are_none(options, words):
    with pytest.raises(aim_jax.InputError, match=words):
        methods.module(options.name).make(options)
    with pytest.raises(aim_jax.InputError, match="method.space: no 'both'"):
        config.resolve(config.Config(method=slao.Options(space="both")))


@pytest.mark.slow
def test_a_stream(tmp_path):
    """The second adapter is the merge of those that two runs of one task each give."""

    def adapters(folder, number):
        (file,) = (folder / "adapters").glob(f"{number:02}-*/*.safetensors")
        return safetensors.numpy.load_file(file)

    changes = {"train__select": "last", "train__epochs": 1}
    folders = []
    for task in test_run.TASKS[:2]:
        cfg = test_run.make(sequential.Options(), data__tasks=(task,), **changes)
        folders.append(tmp_path / task)
        run.run(cfg, folders[-1])
    method = ties.Options(density=0.5)
    cfg = test_run.make(method, data__tasks=test_run.TASKS[:2], **changes)
    run.run(cfg, tmp_path / "both")
    first, second = (adapters(f, 0) for f in folders)
    found = adapters(tmp_path / "both", 0)
    assert all((found[k] == v).all() for k, v in first.items())
    found = adapters(tmp_path / "both", 1)
    moved = 0
    for name, value in found.items():
        if "lora_B" in name:  # which is zero in a fresh adapter
            x = np.float64(np.stack([first[name], second[name]]))
            np.testing.assert_allclose(
                value, elected(trimmed(x, 0.5), (1, 1)), atol=1e-6
            )
            moved += np.abs(value).max() > 1e-4
    assert moved
