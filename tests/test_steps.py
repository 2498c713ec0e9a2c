"""The compiled computations on the embedded model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures import make_models
from flax import linen as nn

from aim_jax import config, lora, methods, steps
from aim_jax.data import batches, synthetic
from aim_jax.models import flash, hf, layers

CFG = config.resolve(
    config.Config(
        data=config.Data(buckets=(32, 64), target_buckets=(8,), device_rows=2),
        train=config.Train(
            batch_size=4,
            micro_batch_size=2,
            learning_rate=1e-2,
            warmup_steps=2,
            clip_norm=0.5,
            weight_decay=0.1,
        ),
        lora=config.Lora(dropout=0.0),
    )
)


class Kit:
    def __init__(self):
        self.base = hf.load(CFG.model)
        self.text = batches.Text(batches.tokenizer(hf.ASSETS), "encdec", CFG.data)
        self.rows = batches.encode(
            self.text,
            synthetic.task("topic", 0, 6, 0, 0)["train"]
            + synthetic.task("extraction", 0, 6, 0, 0)["train"],
        )
        key = jax.random.key(0)
        self.delta = lora.init(key, self.base.params, self.base.keys, CFG.lora)

    def batch(self, micros, average="token"):
        chosen = [[self.rows[i] for i in m] for m in micros]
        rows = len(micros) * max(map(len, micros))
        return batches.collate(self.text, chosen, rows, average)

    def chunk(self, groups):
        return batches.stack(self.text, [[self.rows[i] for i in g] for g in groups], 2)

    def steps(self, cfg=CFG, **hooks):
        pure = steps.make(self.base.model, cfg, methods.Method(**hooks))
        return steps.Steps(*map(jax.jit, pure))

    def state(self, total=20):
        return steps.init(self.delta, total, jax.random.key(1))


@pytest.fixture(scope="module")
def kit():
    return Kit()


@pytest.fixture(scope="module")
def made(kit):
    return kit.steps()


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    # Sums in another order.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)


@pytest.mark.parametrize("average", ["token", "micro_batch"])
def test_loss_of_accumulated_micro_batches(kit, made, average):
    micros = [[0], [6, 7]]
    _, measures = made.train(
        kit.base.params, kit.state(), (), kit.batch(micros, average)
    )
    alone = [
        float(made.train(kit.base.params, kit.state(), (), kit.batch([m]))[1]["loss"])
        for m in micros
    ]
    counts = [sum(len(kit.rows[i].targets) for i in m) for m in micros]
    weights = counts if average == "token" else [1, 1]
    expected = np.average(alone, weights=weights)
    assert counts[0] != counts[1]
    assert float(measures["loss"]) == pytest.approx(expected, rel=1e-5)


def test_padding_rows_change_nothing(kit, made):
    one = kit.batch([[0, 1]])
    padded = batches.collate(kit.text, [[kit.rows[0], kit.rows[1]]], 5)
    a, b = (made.train(kit.base.params, kit.state(), (), x) for x in (one, padded))
    close(a[0].delta, b[0].delta)
    assert float(a[1]["loss"]) == pytest.approx(float(b[1]["loss"]), rel=1e-5)


@pytest.mark.parametrize("rows", [2, 9])  # of one part, and of several
def test_an_empty_probe_runs_nothing(kit, made, rows):
    batch, state = kit.batch([[0, 1]]), kit.state()
    blank = batches.stack(kit.text, [[]], rows)
    assert (blank["inputs"].shape[1] > 1) == (rows > 2)
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), kit.base.params)
    assert float(made.probe(broken, state, (), blank)) == 0
    after, measures = made.train(kit.base.params, state, (), batch, blank)
    assert float(measures["history"]) == 0
    alone, _ = made.train(kit.base.params, state, (), batch)
    same(after, alone)


@pytest.mark.parametrize("name", ["t5", "qwen3"])
def test_padding_left_out_changes_nothing(name):
    """The same loss whether every part is as long as the longest row or cut to its own."""
    model = config.Model(path=str(make_models.FOLDER / name), dropout=0.0)
    base = hf.load(model)
    losses = {}
    for buckets in ((32,), (8, 16, 32)):
        data = config.Data(buckets=buckets, target_buckets=(4,), device_rows=2)
        cfg = dataclasses.replace(
            CFG, data=data, lora=config.Lora(target=(".*(q|v|[qv]_proj)",), dropout=0.0)
        )
        text = batches.Text(None, base.family.KIND, data)
        rows = [
            batches.Example("", np.arange(1, 1 + n), np.array([5, 6]))
            for n in (3, 30, 7, 14, 20, 8)
        ]
        delta = lora.init(jax.random.key(0), base.params, base.keys, cfg.lora)
        state = steps.init(delta, 1, jax.random.key(0))
        probe = jax.jit(steps.make(base.model, cfg, methods.Method()).probe)
        chunk = batches.stack(text, [rows], len(rows))
        losses[buckets] = float(probe(base.params, state, (), chunk))
    first, second = losses.values()
    assert first == pytest.approx(second, rel=1e-6)


def probed(name, attention, pack):
    """Loss and gradients of examples that share rows, if `pack`, or have one each."""
    base = hf.load(config.Model(path=str(make_models.FOLDER / name), dropout=0.0))
    own = config.Lora(target=(".*(q|v|[qv]_proj)",), dropout=0.0)
    rng = np.random.default_rng(0)
    rows = [
        batches.Example("", *(rng.integers(3, 30, size) for size in sizes))
        for sizes in ((3, 2), (30, 1), (7, 3), (14, 2), (20, 4), (8, 1), (12, 5))
    ]
    delta = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32),
        lora.init(jax.random.key(0), base.params, base.keys, own),
    )
    data = config.Data(buckets=(16, 40), target_buckets=(8,), device_rows=2, pack=pack)
    text = batches.Text(None, base.family.KIND, data)
    chunk = batches.stack(text, [rows], len(rows))
    assert chunk["mask"].any((0, 2, 3)).sum() == (2 if pack else 4)
    cfg = dataclasses.replace(CFG, data=data, lora=own)
    built = dataclasses.replace(base.model.config, attention=attention)
    probe = steps.make(type(base.model)(built), cfg, methods.Method()).probe

    def of(delta):
        state = steps.init(delta, 1, jax.random.key(0))
        return probe(base.params, state, (), chunk)

    return jax.jit(jax.value_and_grad(of))(delta)


# What every way of attention is compared with.
alone_in_rows = functools.cache(functools.partial(probed, attention="xla", pack=False))


@pytest.mark.parametrize(
    "name, kernel",
    [
        ("t5", "xla"),
        ("llama2", "xla"),
        ("qwen3", "cudnn"),
        ("gemma3", "cudnn"),
        ("t5", "triton"),
        ("gemma3", "triton"),
        ("t5", "mosaic"),
        ("gemma3", "mosaic"),
    ],
)
def test_examples_that_share_a_row_do_not_see_each_other(name, kernel, monkeypatch):
    """Loss and gradients as with a row each; XLA computes what GPU calls are asked for."""
    attention = jax.nn.dot_product_attention

    def stand_in(*arrays, implementation, **settings):
        assert implementation == "cudnn"
        return attention(*arrays, **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    tiles, calls = flash.attend, []

    def interpreted(*args):
        calls.append(args)
        return tiles(*args, True)

    monkeypatch.setattr(flash, "attend", interpreted)
    for name_, compiler in flash.COMPILERS.items():
        small = compiler._replace(widths=range(99), block=lambda n, _: 8 * (n % 8 == 0))
        monkeypatch.setitem(flash.COMPILERS, name_, small)
    alone, shared = alone_in_rows(name), probed(name, kernel, pack=True)
    assert bool(calls) == (kernel in flash.COMPILERS)
    # Sums in another order.
    assert float(alone[0]) == pytest.approx(float(shared[0]), rel=1e-6)
    largest = max(float(abs(g).max()) for g in jax.tree.leaves(alone[1]))
    assert largest > 1e-3
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6 * largest),
        alone[1],
        shared[1],
    )


def test_learning_rate_rises_from_zero_and_falls_to_zero():
    train = dataclasses.replace(CFG.train, learning_rate=1.0, warmup_steps=4)
    rates = [
        float(steps.learning_rate(jnp.int32(s), jnp.int32(10), train))
        for s in range(11)
    ]
    assert rates == pytest.approx(
        [0, 0.25, 0.5, 0.75, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0], abs=1e-6
    )
    # A task shorter than the warm-up never gets past it.
    assert float(steps.learning_rate(jnp.int32(2), jnp.int32(3), train)) == 0.5


def test_the_first_step_moves_nothing_but_the_moments(kit, made):
    state, measures = made.train(kit.base.params, kit.state(), (), kit.batch([[0, 1]]))
    same(state.delta, kit.delta)
    assert float(measures["movement"]) == 0 and float(measures["lr"]) == 0
    assert int(state.adam.count) == int(state.step) == 1


def test_an_update_is_clipped_adam(kit, made):
    state = kit.state()._replace(step=jnp.int32(1))
    batch = kit.batch([[0, 1]])
    after, measures = made.train(kit.base.params, state, (), batch)
    norm = float(measures["grad_norm"])
    assert norm > CFG.train.clip_norm
    # Moments of the first update hold the clipped gradient.
    clipped = jax.tree.map(lambda m: m / 0.1, after.adam.mu)
    length = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(clipped)))
    assert length == pytest.approx(CFG.train.clip_norm, rel=1e-4)
    rate = float(measures["lr"])
    jax.tree.map(
        lambda p, q, g: np.testing.assert_allclose(
            q, p - rate * (g / (abs(g) + 1e-8) + 0.1 * p), atol=1e-6
        ),
        state.delta,
        after.delta,
        clipped,
    )
    moved = jax.tree.map(lambda p, q: np.ravel(q - p), state.delta, after.delta)
    moved = np.concatenate(jax.tree.leaves(moved))
    assert float(measures["movement"]) == pytest.approx(abs(moved).mean(), rel=1e-4)
    assert float(measures["distance"]) == pytest.approx(np.linalg.norm(moved), rel=1e-4)


def test_adam_is_that_of_optax():
    rng, adam = np.random.default_rng(0), optax.scale_by_adam()
    ours = theirs = adam.init(jnp.zeros(50))
    for scale in (1.0, 3.0, 1e-7, 0.0):
        grads = jnp.float32(scale * rng.normal(size=50))
        changes, ours = steps._adam(grads, ours)
        expected, theirs = adam.update(grads, theirs)
        np.testing.assert_allclose(changes, expected, rtol=2e-5)


def test_a_method_is_told_which_steps_rehearse(kit):
    told = {}

    def gradients(state, grads, magnitudes, memo, rehearsal):
        told[rehearsal] = True
        return grads, state.carry

    pure = steps.make(kit.base.model, CFG, methods.Method(gradients=gradients))
    given = kit.base.params, kit.state(), ()
    jax.eval_shape(pure.train, *given, kit.batch([[0, 1]]))
    assert list(told) == [False]
    jax.eval_shape(pure.rehearse, *given, kit.chunk([[0, 1]]), 1)
    assert list(told) == [False, True]


def test_each_part_of_a_batch_has_dropout_of_its_own():
    """By a model that is nothing but its random key."""

    class Noise:
        def apply(self, variables, batch, rngs):
            shape = (*batch["targets"].shape, 9)
            return jax.random.uniform(rngs["dropout"], shape)

    data = config.Data(buckets=(8,), target_buckets=(2,), device_rows=1, pack=False)
    cfg = dataclasses.replace(CFG, data=data)
    made = steps.make(Noise(), cfg, methods.Method(probe_dropout=True))
    text = batches.Text(None, "encdec", data)
    row = batches.Example("", np.arange(1, 4), np.array([5, 6]))
    state = steps.init(
        {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}, 9, jax.random.key(0)
    )
    losses = [
        loss
        for rows in ([row], [row, row])
        for loss in (
            made.train({}, state, (), batches.collate(text, [rows], 2))[1]["loss"],
            made.probe({}, state, (), batches.stack(text, [rows], 2)),
        )
    ]
    trained, probed, *both = map(float, losses)
    assert trained == probed and both[0] == both[1] != trained


def test_rehearsal_is_updates_at_one_rate_with_shared_moments(kit, made):
    state = kit.state()._replace(step=jnp.int32(3))
    micros = [[0, 1], [6, 7], [2, 3]]
    chunk = kit.chunk(micros)
    after, losses = made.rehearse(kit.base.params, state, (), chunk, 2)
    expected = state
    for number, micro in enumerate(micros[:2]):
        expected, measures = made.train(
            kit.base.params, expected, (), kit.batch([micro])
        )
        expected = expected._replace(step=state.step)
        assert float(losses[number]) == pytest.approx(float(measures["loss"]), rel=1e-5)
    close(after.delta, expected.delta)
    assert int(after.adam.count) == 2 and int(after.step) == 3
    assert float(losses[2]) == 0
    untouched, _ = made.rehearse(kit.base.params, state, (), chunk, 0)
    same(untouched, state)


def test_dropout_is_random_by_step_and_repeats_when_a_step_is_repeated(kit):
    dropping = dataclasses.replace(CFG, lora=config.Lora(dropout=0.5))
    made = kit.steps(dropping, probe_dropout=True)
    quiet = kit.steps(dropping, probe_dropout=False)
    batch = kit.batch([[0, 1]])
    state = kit.state()._replace(step=jnp.int32(1))
    first, _ = made.train(kit.base.params, state, (), batch)
    again, _ = made.train(kit.base.params, state, (), batch)
    same(first, again)
    chunk = kit.chunk([[0, 1]])
    noisy = float(made.probe(kit.base.params, first, (), chunk))
    assert noisy == float(made.probe(kit.base.params, first, (), chunk))
    later = first._replace(adam=first.adam._replace(count=first.adam.count + 1))
    assert noisy != float(made.probe(kit.base.params, later, (), chunk))
    still = [float(quiet.probe(kit.base.params, s, (), chunk)) for s in (first, later)]
    assert still[0] == still[1] != noisy


def test_validation_sums_the_weighted_losses(kit, made):
    batch = kit.batch([[0, 1]])
    _, measures = made.train(kit.base.params, kit.state(), (), batch)
    total = float(made.validate(kit.base.params, kit.delta, batch))
    count = batch["weights"].sum()
    assert total / count == pytest.approx(float(measures["loss"]), rel=1e-5)


def test_magnitudes_are_sums_over_real_tokens(kit):
    """|A x| and |output| of every layer, against outputs caught on their way."""

    def gradients(state, grads, magnitudes, memo, rehearsal):
        return grads, magnitudes

    sizes = dataclasses.replace(kit.base.model.config, dropout=0.0)
    model = kit.base.model.clone(config=sizes)
    method = methods.Method(carry=lora.units, gradients=gradients, magnitudes=True)
    train = jax.jit(steps.make(model, CFG, method).train)
    moved = jax.tree.map(lambda x: x + 0.01, kit.delta)
    state = steps.init(moved, 20, jax.random.key(1), method)
    batch = kit.batch([[0], [6, 7]])
    after, _ = train(kit.base.params, state, (), batch)
    caught = []

    def catch(call, args, kwargs, context):
        y = call(*args, **kwargs)
        path = "/".join(context.module.path)
        traced = isinstance(y, jax.core.Tracer)  # a scan looks at its body first
        if path.endswith(("/q", "/v")) and not traced:
            caught.append((path, args[0], y))
        return y

    # What is computed anew in the backward pass is traced, even without jit.
    model = model.clone(config=dataclasses.replace(sizes, remat="none"))
    expected = jax.tree.map(np.zeros_like, lora.units(moved))
    bound = lora.bind(moved, CFG.lora)
    for number in range(2):
        micro = {k: v[number] for k, v in batch.items()}
        with jax.disable_jit(), nn.intercept_methods(catch):
            model.apply({"params": kit.base.params, "lora": bound}, micro)
        numbers = {}
        for path, x, y in caught:
            layer = numbers[path] = numbers.get(path, -1) + 1
            source = path.startswith("encoder") or path.endswith("cross/v")
            real = micro["mask"] if source else micro["weights"] > 0
            node, delta = expected, moved
            for part in path.split("/"):
                node, delta = node[part], delta[part]
            a = np.abs(np.asarray(x) @ np.asarray(delta["a"][layer]).T)
            node["a"][layer] += (a * real[..., None]).sum((0, 1))
            node["b"][layer] += (np.abs(y) * real[..., None]).sum((0, 1))
        caught.clear()
    counts = {sizes.encoder_layers - 1, sizes.decoder_layers - 1}
    assert len(numbers) == 6 and set(numbers.values()) == counts
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), after.carry, expected
    )


def test_a_layer_that_runs_over_the_last_positions_measures_those():
    rng = np.random.default_rng(0)
    x, a, b, w = (
        np.float32(rng.normal(size=n)) for n in [(2, 3, 4), (2, 4), (5, 2), (5, 4)]
    )
    real = np.float32([[1, 0, 0, 1, 1], [1, 1, 0, 0, 1]])
    lora_of = {"a": a, "b": b, "real": real}
    zeros = {"on_a": np.zeros(2, np.float32), "on_b": np.zeros(5, np.float32)}

    def loss(zeros):
        variables = {"params": {"weight": w}, "lora": lora_of | zeros}
        return jnp.sum(layers.Dense(5).apply(variables, x))

    found = jax.grad(loss)(zeros)
    h, last = x @ a.T, real[:, 2:, None]
    np.testing.assert_allclose(found["on_a"], (abs(h) * last).sum((0, 1)), rtol=1e-5)
    y = x @ w.T + h @ b.T
    np.testing.assert_allclose(found["on_b"], (abs(y) * last).sum((0, 1)), rtol=1e-5)
