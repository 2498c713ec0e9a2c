"""The method step by step against the recorded run of the PyTorch release.

Recorded batches go through the real steps, probe, rehearsal, controller and fusion. As the
dynamics amplify rounding, comparison starts again at every recorded state (the golden
README says how). The numbers here may be updated only with a new recording.
"""

import collections
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_jax import (
    config,
    evaluate,
    fusion,
    jobs,
    lora,
    methods,
    metrics,
    parallel,
    run,
    steps,
)
from aim_jax.data import batches
from aim_jax.methods import aim
from aim_jax.models import hf, layers

pytestmark = golden.needed

# Relative. Float32 rounding reaches 1e-5 inside a segment; where the issue of rounding is
# larger, the table below says where and why, and holds what was measured.
TIGHT = 1e-4
LONG = (
    5e-3  # after more than 40 rehearsal steps, where the release itself differs by 2e-3
)

# (task, restart step) -> quantity -> bar: what was measured where PyTorch itself, played
# again in float32 by tests/referee.py, is further from its recording (docs/parity.md).
# - task1 from step 89: 23 rehearsal steps, whose losses are compared too. PyTorch in float64
#   is 6.6e-4 (fused adapter 2.1e-4) from the recording, with rounding added up to 8.8e-4.
# - task3 from step 110: 44 steps, then 57 rehearsal steps, the longest segment. Float32 of
#   PyTorch is 1.2e-1 (gradient norms) and 2.3e-2 (fused adapter) from the recorded ones.
AMPLIFIED = {
    ("task1_amazon_ours", 89): {"rehearsal": 1e-3, "fused": 3e-4},
    ("task3_agnews_ours", 110): {"grad_norm": 1e-3, "fused": 2e-2},
}

# (task, step) -> edge: ReLUs let through what is above it. There one input of a ReLU is
# within rounding of 0 and the recorded run fell on the other side, which changes the
# gradient by up to 1e-3; the next steps amplify that. See test_one_unit_explains_the_gradient_norm.
KINKS = {
    ("task0_dbpedia_ours", 4): 1e-6,  # float64: -1.1e-6, here: 1.6e-7
    ("task1_amazon_ours", 2): -3e-6,  # float64: -3.0e-7, the recording has it active
}


class Kit:
    """Everything compiled once, and the flat layout of the recorded adapters."""

    def __init__(self):
        self.cfg = golden.settings()
        self.base = hf.load(self.cfg.model)
        tokenizer = batches.tokenizer(golden.FOLDER / "base")
        self.text = batches.Text(tokenizer, self.base.family.KIND, self.cfg.data)
        self.method = aim.make(self.cfg.method)
        pure = steps.make(self.base.model, self.cfg, self.method)
        self.devices = parallel.open_devices(config.Parallel(mode="jit"))
        self.steps = steps.Steps(*map(jax.jit, pure))
        self.kinked = {
            edge: jax.jit(functools.partial(kinked, pure.train, edge))
            for edge in KINKS.values()
        }
        layout = golden.read("lora_layout.json")
        self.place = {e["name"]: (e["offset"], e["size"], e["shape"]) for e in layout}
        self.size = sum(e["size"] for e in layout)
        self.modules = lora.targets(self.base.keys, self.cfg.lora)
        self.shapes = jax.eval_shape(
            lambda: lora.init(
                jax.random.key(0), self.base.params, self.base.keys, self.cfg.lora
            )
        )

    def places(self, path, count):
        """Where the recorded vector holds the layers of one leaf of the delta."""
        module, _, side = path.rpartition("/")
        name = "base_model.model.{}.lora_{}.weight"
        return [
            self.place[name.format(self.modules[module].format(i), side.upper())]
            for i in range(count)
        ]

    def tree(self, vector):
        """The delta of a recorded vector."""
        flat = {}
        for path, leaf in hf.flatten(self.shapes).items():
            found = self.places(path, leaf.shape[0])
            parts = [vector[at : at + size].reshape(s) for at, size, s in found]
            flat[path] = jnp.asarray(np.stack(parts))
        return hf.unflatten(flat)

    def vector(self, tree):
        """A delta in the recorded layout."""
        out = np.zeros(self.size)
        for path, leaf in hf.flatten(tree).items():
            found = self.places(path, leaf.shape[0])
            for (at, size, _), layer in zip(found, np.asarray(leaf), strict=True):
                out[at : at + size] = layer.ravel()
        return out

    def state(self, data, delta, step=0, adam=None):
        """A state at `step` with recorded moments number `adam`, or none yet."""
        state = steps.init(self.tree(delta), len(data["lr"]), jax.random.key(0))
        if adam is None:
            return state
        moments = state.adam._replace(
            count=jnp.int32(data["adam_count"][adam]),
            mu=self.tree(data["adam_m"][adam]),
            nu=self.tree(data["adam_v"][adam]),
        )
        return state._replace(adam=moments, step=jnp.int32(step))


def kinked(train, edge, *args):
    """A train step with ReLUs that let through what is above `edge`, in place of 0."""
    relu = layers.ACTIVATIONS["relu"]
    layers.ACTIVATIONS["relu"] = lambda x: jnp.where(x > edge, x, 0.0)
    try:
        return train(*args)
    finally:
        layers.ACTIVATIONS["relu"] = relu


@pytest.fixture(scope="module")
def kit():
    return Kit()


def apart(ours, recorded):
    """Distance relative to the norm of what was recorded."""
    recorded = np.float64(recorded)
    return float(np.linalg.norm(ours - recorded) / np.linalg.norm(recorded))


def cases(found, kept):
    """Parameters of a test; those that are not kept for every day are slow."""
    return [
        pytest.param(
            *case,
            marks=() if kept(*case) else pytest.mark.slow,
            id="-".join(map(str, case)),
        )
        for case in found
    ]


def segments():
    """(task, restart step) of every recorded restart point."""
    for name in golden.CONTINUAL:
        data = golden.trace(name)
        records = zip(data["adam_tag"], data["adam_step"], strict=True)
        points = (int(s) for t, s in records if t != "before_outer")
        yield from ((name, s) for s in dict.fromkeys((0, *points)))


def everyday(name, start):
    """25 steps of the first task, and the first two merges of the second.

    The other segments say the same of more steps and of longer inputs.
    """
    return name in golden.CONTINUAL[:2] and 0 < start < 20


def restart(kit, data, step):
    """State, memo and controller as recorded after `step`."""
    rules = kit.cfg.method
    history = data.get("probe_loss", ())
    controls = {
        s: after
        for s, _, _, after in golden.replay(rules, history, data.get("merge_l1", ()))
    }
    merges = [int(s) for s in data.get("merge_step", ()) if s <= step]
    if step == 0:
        state = kit.state(data, data["lora_start"])
        return state, kit.method.start(state.delta, 1)
    tags = list(zip(data["adam_tag"].tolist(), data["adam_step"].tolist(), strict=True))
    if ("after_outer", step) in tags:
        adam = tags.index(("after_outer", step))
        delta = data["merge_after"][len(merges) - 1]
    else:
        adam = tags.index(("after_inner_step", step))
        delta = data["snap_lora"][data["snap_step"].tolist().index(step)]
    origin = data["merge_after"][len(merges) - 1] if merges else data["lora_start"]
    state = kit.state(data, delta, step, adam)
    return state, methods.Memo({"origin": kit.tree(origin)}, controls.get(step))


@pytest.mark.parametrize("name, start", cases(segments(), everyday))
def test_segment(kit, name, start):
    data = golden.trace(name)
    worst = play(kit, name, *restart(kit, data, start), start)
    bars = AMPLIFIED.get((name, start), {})
    print(name, start, {k: f"{v:.1e}" for k, v in worst.items()})
    for quantity, value in worst.items():
        usual = LONG if quantity.startswith("long_") else TIGHT
        assert value <= bars.get(quantity.removeprefix("long_"), usual), (
            quantity,
            value,
        )


def play(kit, name, state, memo, start):
    """Worst deviations from `start` up to the next merge, or over the first 25 steps."""
    data = golden.trace(name)
    total = len(data["lr"])
    worst = {}

    def note(quantity, value):
        worst[quantity] = max(worst.get(quantity, 0.0), abs(float(value)))

    for step in range(start + 1, min(total, start + 25 if start == 0 else total) + 1):
        batch = golden.train_batch(kit.text, kit.cfg, data, step)
        train = kit.kinked.get(KINKS.get((name, step)), kit.steps.train)
        state, measures = train(kit.base.params, state, (), batch)
        loss = data["mb_loss"][data["mb_step"] == step].sum()
        note("loss", measures["loss"] / loss - 1)
        note("grad_norm", measures["grad_norm"] / data["grad_norm"][step - 1] - 1)
        note("lr", (measures["lr"] - data["lr"][step - 1]) / data["lr"].max())
        inner, history = state, None
        moments(kit, data, "after_inner_step", step, state, note)
        if "probe_loss" in data:
            rows = [data["probe_rows"][step - 1]]
            batch = golden.memory_batch(kit.text, kit.cfg, data, rows)
            history = float(kit.steps.probe(kit.base.params, state, (), batch))
            note("history", history / data["probe_loss"][step - 1] - 1)
        signals = methods.Signals(
            step, total, **{k: float(v) for k, v in measures.items()}, history=history
        )
        rehearsal = functools.partial(rehearse, kit, data, note)
        tools = methods.Tools(
            number=1,
            remembered=int(history is not None),
            rehearse=rehearsal,
            fuse=fusion.fuse,
            fresh=None,
            fisher=None,
        )
        state, memo, record = kit.method.after_step(tools, state, memo, signals)
        assert bool(record) == bool(data["ctl_merged"][step - 1]), step
        if record:
            merge = data["merge_step"].tolist().index(step)
            after = compare_merge(kit, data, merge, record, inner, state, memo)
            for quantity, value in after.items():
                note(quantity, value)
            if start:
                break
        if step in data["eval_step"]:
            note("validation", validation(kit, data, step, state.delta))
        if "probe_loss" not in data and step >= start + 25:
            break
    return worst


def rehearse(kit, data, note, state, memo, step, count):
    """The rehearsal of `Tools`, on the recorded batches."""
    numbers = np.flatnonzero(data["outer_step"] == step)
    assert len(numbers) == count
    moments(kit, data, "before_outer", step, state, note)
    losses = []
    for first in range(0, count, 8):
        part = numbers[first : first + 8]
        rows = [data["outer_rows"][part[i % len(part)]] for i in range(8)]
        batch = golden.memory_batch(kit.text, kit.cfg, data, rows)
        state, made = kit.steps.rehearse(kit.base.params, state, (), batch, len(part))
        losses += np.asarray(made)[: len(part)].tolist()
    long = "long_" if count > 40 else ""
    deviations = np.abs(losses / data["outer_loss"][numbers] - 1)
    if not long:
        note("rehearsal", deviations.max())
        moments(kit, data, "after_outer", step, state, note)
    merge = data["merge_step"].tolist().index(step)
    for at, vector in zip(
        data["merge_post_outer_index"], data["merge_post_outer"], strict=True
    ):
        if at == merge:
            note(long + "outer", apart(kit.vector(state.delta), vector))
    return state, losses


def moments(kit, data, tag, step, state, note):
    """Compare Adam's moments and count, and the adapter, where they were recorded."""
    for i, record in enumerate(zip(data["adam_tag"], data["adam_step"], strict=True)):
        if record == (tag, step):
            assert int(state.adam.count) == data["adam_count"][i]
            note("moments", apart(kit.vector(state.adam.mu), data["adam_m"][i]))
            note("moments", apart(kit.vector(state.adam.nu), data["adam_v"][i]))
    if tag == "after_inner_step" and step in data["snap_step"]:
        at = data["snap_step"].tolist().index(step)
        note("inner", apart(kit.vector(state.delta), data["snap_lora"][at]))


def compare_merge(kit, data, merge, record, inner, state, memo):
    """Integers and weights must be those recorded; the adapters' distances come back."""
    for ours, theirs in (
        ("interval", "merge_S"),
        ("rehearsal", "merge_M"),
        ("planned", "merge_outer_begin"),
        ("flag", "merge_flag"),
        ("window", "merge_n_window"),
        ("next_interval", "merge_S_next"),
        ("next_rehearsal", "merge_M_next"),
        ("next_planned", "merge_outer_begin_next"),
    ):
        assert record[ours] == data[theirs][merge], ours
    assert record["weights"] == [data[f"merge_w_{w}"][merge] for w in ("in", "out")]
    assert record["threshold"] == pytest.approx(
        data["merge_threshold"][merge], rel=1e-3
    )
    assert memo.arrays["origin"] is state.delta
    long = "long_" if record["rehearsal"] > 40 else ""
    return {
        "inner": apart(kit.vector(inner.delta), data["merge_theta_k"][merge]),
        f"{long}fused": apart(kit.vector(state.delta), data["merge_after"][merge]),
        "learning": record["learning"] / data["merge_l1"][merge] - 1,
    }


def validation(kit, data, step, delta):
    """Relative deviation of the validation loss of an adapter."""
    examples = golden.examples(data, data["eval_rows"])
    made = batches.validation_batches(kit.text, examples, 16, kit.cfg.train.average)
    loss = sum(float(kit.steps.validate(kit.base.params, delta, b)) for b in made)
    return loss / data["eval_loss"][data["eval_step"].tolist().index(step)] - 1


def test_forward_and_gradient(kit):
    data = np.load(golden.FOLDER / "forward.npz")
    kept = data["labels"] >= 0
    batch = {
        "inputs": data["input_ids"],
        "mask": data["attention_mask"].astype(bool),
        "targets": np.where(kept, data["labels"], 0),
        "weights": kept.astype(np.float32),
    }
    delta = kit.tree(golden.trace(golden.CONTINUAL[1])["lora_end"])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(delta):
        low = lora.bind(delta, kit.cfg.lora)
        logits = kit.base.model.apply({"params": kit.base.params, "lora": low}, batch)
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), batch["targets"][..., None], -1
        )[..., 0]
        return -jnp.sum(picked * batch["weights"]) / kept.sum(), logits

    (value, logits), _ = loss(jax.tree.map(jnp.zeros_like, delta))
    # The logits reach 20; PyTorch in float32 is as far from float64.
    np.testing.assert_allclose(logits, data["base_logits"], atol=1e-4)
    assert float(value) == pytest.approx(float(data["base_loss"]), rel=1e-5)
    (value, logits), grad = loss(delta)
    np.testing.assert_allclose(logits[:1], data["lora_logits"], atol=1e-4)
    assert float(value) == pytest.approx(float(data["lora_loss"]), rel=1e-5)
    assert apart(kit.vector(grad), data["lora_grad"]) <= TIGHT


@pytest.mark.parametrize(
    "name",
    cases(
        ((name,) for name in golden.CONTINUAL),
        lambda name: golden.trace(name)["mb_input_len"][0] <= golden.SHORT,
    ),
)
def test_gradients_before_anything_has_moved(kit, name):
    data = golden.trace(name)
    state = kit.state(data, data["lora_start"])
    batch = golden.train_batch(kit.text, kit.cfg, data, 1)
    after, measures = kit.steps.train(kit.base.params, state, (), batch)
    assert float(measures["grad_norm"]) == pytest.approx(
        data["grad_norm"][0], rel=TIGHT
    )
    # The first learning rate is 0, so only the moments tell what the gradient was.
    clip = min(1.0, kit.cfg.train.clip_norm / (float(measures["grad_norm"]) + 1e-6))
    at = list(
        zip(data["grad_phase"].tolist(), data["grad_step"].tolist(), strict=True)
    ).index(("inner", 1))
    # Entry by entry a gradient over a thousand tokens differs more than its norm does.
    assert apart(kit.vector(after.adam.mu), 0.1 * clip * data["grad"][at]) <= 2e-4
    assert apart(kit.vector(after.delta), data["lora_start"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name, step", [("task1_amazon_ours", 2)])
def test_one_unit_explains_the_gradient_norm(kit, name, step):
    if name not in golden.CONTINUAL:
        pytest.skip(f"{name} is not in {golden.FOLDER}")
    data = golden.trace(name)
    assert (
        data["lr"][step - 2] == 0
    )  # nothing has moved: the weights are those recorded
    state = kit.state(data, data["lora_start"])
    batch = golden.train_batch(kit.text, kit.cfg, data, step)
    norms = [
        float(train(kit.base.params, state, (), batch)[1]["grad_norm"])
        for train in (kit.steps.train, kit.kinked[KINKS[name, step]])
    ]
    recorded = data["grad_norm"][step - 1]
    assert abs(norms[0] / recorded - 1) > TIGHT
    assert norms[1] == pytest.approx(recorded, rel=1e-6)


@pytest.mark.parametrize("name", golden.CONTINUAL + golden.SINGLE)
def test_the_best_checkpoint_is_the_recorded_one(kit, name):
    """The loop of every method, on the recorded validation losses: a delta is its step."""
    data = golden.trace(name)
    losses = dict(zip(data["eval_step"].tolist(), data["eval_loss"], strict=True))

    def train(base, state, memo, batch, chunk):
        measures = dict.fromkeys(("loss", "grad_norm", "lr", "movement"), 0.0)
        return state._replace(delta=state.delta + 1), measures

    def validate(base, delta, batch):
        return losses.pop(int(delta))

    (example,) = golden.examples(data, data["eval_rows"][:1])
    rows = [example] * len(data["train_rows"])
    job = jobs.partial(
        cfg=kit.cfg,
        base=kit.base,
        text=kit.text,
        devices=kit.devices,
        steps=steps.Steps(train, None, None, validate, None),
        method=methods.Method(),
        work=collections.Counter(),
    )
    zero = np.float32(0)
    state = steps.init(zero, 0, jax.random.key(0))
    start = run.Place(0, state, methods.Memo(), zero, np.inf)
    lesson = jobs.Lesson(name, 0, rows, [example], [], (0, 0))
    end = run.train(job, lesson, start, lambda *a: None, lambda *a: None)
    assert job.work["steps"] == len(data["lr"])
    assert not losses
    assert int(end.state.delta) == data["best_step"]


@pytest.fixture(scope="module")
def predictions(kit):
    """Predicted tokens and texts of recorded adapters, for the asked-for rows."""
    cfg = kit.cfg
    eos = kit.text.tokenizer.eos_token_id
    decode = evaluate.greedy(kit.base.model, (eos,), cfg, kit.devices)

    def run(delta, task, longest):
        rows = golden.read(f"data/test/{task}_T5.json.gz")
        examples = batches.encode(kit.text, rows, truncate=False)
        examples = [e for e in examples if len(e.inputs) <= longest]
        kept = {e.id for e in examples}
        rows = [r for r in rows if r["id"] in kept]
        tokens = evaluate.generate(
            decode, kit.base.params, delta, kit.text, examples, 32, kit.devices
        )
        return rows, tokens, evaluate.texts(kit.text.tokenizer, tokens)

    return run


@pytest.mark.parametrize(
    "kind, longest",
    cases(
        [
            ("final", golden.SHORT),
            *((k, np.inf) for k in ("final", "right_after", "single_task")),
        ],
        lambda kind, longest: longest == golden.SHORT,
    ),
)
def test_predictions_token_for_token(kit, predictions, kind, longest):
    order = golden.read("hyperparameters.json")["order"]
    recorded = golden.read("predictions.json.gz")[kind]
    eos = kit.text.tokenizer.eos_token_id
    for number, task in enumerate(order):
        names = golden.SINGLE if kind == "single_task" else golden.CONTINUAL
        which = len(order) - 1 if kind == "final" else number
        delta = kit.tree(golden.trace(names[which])["lora_end"])
        rows, tokens, texts = predictions(delta, task, longest)
        found = {r["id"]: r for r in recorded[task]}
        assert len(found) == len(rows) or longest < np.inf
        for row, ids, text in zip(rows, tokens, texts, strict=True):
            theirs = found[row["id"]]
            sequence = [0, *ids.tolist(), eos][: len(theirs["output_ids"])]
            assert sequence == theirs["output_ids"]
            assert text == theirs["prediction"]
            assert metrics.exact(text, row["output"]) == theirs["exact"]
