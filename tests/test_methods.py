"""The contract that every method keeps, and the rule of each against a formula of its own."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from test_fusion import adapter

import aim_jax
from aim_jax import config, controller, jobs, logs, lora, methods, run, steps
from aim_jax.data import batches, synthetic
from aim_jax.methods import aim, ewc, inc_lora, l2
from aim_jax.models import hf

TASKS = synthetic.STREAM[:2]
# Constants that make a method act within four steps.
SMALL = {
    "aim": {"interval": 2, "rehearsal": 2, "threshold_factor": 1.0},
    "replay_interval": {"interval": 2},
    "ema": {"every": 2},
    "forever": {"calibration": 2, "rehearsal": 2},  # the first step moves nothing
    "step_ebbinghaus": {"calibration": 1, "rehearsal": 2},
    "recurrent_kif": {"interval": 2, "rehearsal": 2},
}


def make(name, **options):
    """A config of two tasks of four steps each."""
    kind = methods.module(name).Options
    cfg = config.Config(
        model=config.Model(dropout=0.0),
        data=config.Data(
            tasks=TASKS,
            limit_train=8,
            limit_dev=2,
            limit_test=2,
            buckets=(64,),
            target_buckets=(8,),
        ),
        memory=config.Memory(percent=50.0, batch_size=4, rule="exact"),
        train=config.Train(
            epochs=2, batch_size=4, learning_rate=1e-2, warmup_steps=1, eval_every=2
        ),
        lora=config.Lora(dropout=0.0),
        method=kind(**SMALL.get(name, {}) | options),
        eval=config.Eval(fwt=False, batch_size=2, max_length=3),
        checkpoint=config.Checkpoint(steps=3),
        logs=config.Logs(progress=False),
    )
    return config.resolve(cfg)


def rows(folder, name):
    file = folder / name
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def adapters(folder):
    return {
        p.parent.name: safetensors.numpy.load_file(p)
        for p in sorted((folder / "adapters").glob("*/adapter_model.safetensors"))
    }


class Lessons:
    """Training on two tasks, without what a run writes; jobs share what is compiled."""

    def __init__(self, folder):
        self.folder, self.parts = folder, {}

    def job(self, name, **options):
        cfg = make(name, **options)
        # Whole runs validate; here it would be one more function to compile.
        train = dataclasses.replace(cfg.train, eval_every=100)
        cfg = dataclasses.replace(cfg, train=train)
        if not self.parts:
            self.parts["job"] = jobs.prepare(make("aim"), self.folder)
        job, method = self.parts["job"], methods.module(name).make(cfg.method)
        made = job.plain
        hooks = (method.compose, method.penalty, method.rehearsal_penalty)
        if any((*hooks, method.gradients)):
            made = jobs.compile_steps(job.base, cfg, job.devices, method)
        return dataclasses.replace(job, cfg=cfg, method=method, steps=made)

    def start(self, job):
        return run.beginning(job)

    def train(self, job, number, place, save=lambda place: None):
        """The place after the task, and what was logged."""
        logged = []
        task = jobs.lesson(job, number)
        after = run.train(job, task, place, lambda *row: logged.append(row), save)
        return after, logged


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    return Lessons(tmp_path_factory.mktemp("lessons"))


def thawed(place):
    """A place after a way through a checkpoint: arrays, and JSON."""
    arrays, facts = run.pack(place)
    arrays = jax.tree.map(lambda x: jax.device_put(np.array(x)), arrays)
    return run.unpack(place, arrays, json.loads(json.dumps(facts)))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


# One of each kind of hook every day, as compiling takes 10 s a method; all with --all.
DAILY = ("aim", "ewc", "inc_lora", "replay", "ties")


@pytest.mark.parametrize(
    "name",
    [
        name if name in DAILY else pytest.param(name, marks=pytest.mark.slow)
        for name in methods.names()
    ],
)
def test_contract(name, lessons):
    """The first task has no memory; a place in the second is as good as the whole way.

    Shapes stay, so nothing is compiled anew.
    """
    job = lessons.job(name)
    compiled = [step._cache_size() for step in job.steps]
    begun = lessons.start(job)
    middle, _ = lessons.train(job, 0, begun)
    places = []
    rehearsed = job.work["rehearsal_steps"]
    ended, logged = lessons.train(job, 1, middle, places.append)
    if job.method.memory and job.method.after_step:
        assert job.work["rehearsal_steps"] > rehearsed
    assert len(places) >= 4 and all(
        np.isfinite(x).all() for x in jax.tree.leaves(ended.state)
    )
    assert shapes(begun.memo.arrays) == shapes(ended.memo.arrays)
    for number in range(2):
        made = run.adapter(job, ended, number)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(made))
    first = thawed(places[2])
    assert first.step == 3
    again, more = lessons.train(job, 1, first)
    same(run.pack(again)[0], run.pack(ended)[0])
    assert run.pack(again)[1] == run.pack(ended)[1]
    assert more == logged[-len(more) :]
    for before, step in zip(compiled, job.steps, strict=True):
        assert step._cache_size() <= before + 1


class Runs:
    """Runs of one config that share what is compiled."""

    def __init__(self, folder, name, **memory):
        cfg = make(name)
        memory = dataclasses.replace(cfg.memory, **memory)
        self.cfg, self.folder = dataclasses.replace(cfg, memory=memory), folder
        self.job = jobs.prepare(self.cfg, folder / "unused")

    def job_in(self, cfg, folder, load):
        return dataclasses.replace(
            self.job,
            folder=folder,
            memory=list(self.job.memory),
            work=collections.Counter(),
        )

    def __call__(self, name, monkeypatch):
        monkeypatch.setattr(jobs, "prepare", self.job_in)
        return run.run(self.cfg, self.folder / name), self.folder / name


def stop(runs, monkeypatch, after):
    """Interrupt the run "stopped" when it reads the signals of step number `after`."""
    real, seen = run._read, []

    def interrupted(step, *args):
        seen.append(step)
        if len(seen) == after:
            raise KeyboardInterrupt
        return real(step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs("stopped", patch)


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.names())
def test_a_whole_run(name, tmp_path, monkeypatch):
    """Two tasks, the first without memory; stopped in the second, resumed; one shape."""
    runs = Runs(tmp_path, name)
    results, whole = runs("whole", monkeypatch)
    assert results["finished"] and None not in results["matrix"][-1]
    made = adapters(whole)
    assert all(np.isfinite(x).all() for a in made.values() for x in a.values())
    trained = [r for r in rows(whole, logs.METRICS) if "loss" in r]
    last = trained[-1]
    assert last["step"] == last["total"] >= 4

    stop(runs, monkeypatch, after=len(trained))
    begun = len(list((tmp_path / "stopped" / "adapters").glob("*")))
    again, stopped = runs("stopped", monkeypatch)
    assert begun == len(made) - 1
    assert again["matrix"] == results["matrix"] and again["work"] == results["work"]
    for file in (logs.METRICS, logs.MERGES):
        assert rows(stopped, file) == rows(whole, file)
    for task, tensors in adapters(stopped).items():
        for path, value in tensors.items():
            np.testing.assert_array_equal(value, made[task][path])
    for step in runs.job.steps:
        assert step._cache_size() <= 1


def test_a_memory_that_the_model_writes(tmp_path, monkeypatch):
    """It is there from the second task on, and a stopped run comes back to it."""
    runs = Runs(tmp_path, "replay", source="model", samples=1, max_tokens=24)
    results, whole = runs("whole", monkeypatch)
    (file,) = (whole / "memory").iterdir()
    assert file.name == f"00-{TASKS[0]}.jsonl"
    written = rows(whole, f"memory/{file.name}")
    first, second = runs.job.stream
    head = first.train[0]["input"].partition("Text:")[0]
    assert written and all(row["input"].startswith(head) for row in written)
    assert not {row["input"] for row in written} & {r["input"] for r in first.train}
    # Two epochs in batches of four, over the task and what was written.
    steps = [r for r in rows(whole, logs.METRICS) if "loss" in r and r["task"] == 1]
    assert len(steps) == 2 * -(-(len(second.train) + len(written)) // 4)
    assert results["work"]["synthesis_tokens"] > 0
    stop(runs, monkeypatch, after=7)
    again, stopped = runs("stopped", monkeypatch)
    assert again["matrix"] == results["matrix"] and again["work"] == results["work"]
    assert rows(stopped, f"memory/{file.name}") == written
    assert rows(stopped, logs.METRICS) == rows(whole, logs.METRICS)


def test_replay_trains_on_the_task_and_the_memory_together(lessons):
    job = lessons.job("replay")
    first, second = (jobs.lesson(job, n) for n in range(2))
    ids = [e.id for e in second.train]
    assert [e.id for e in first.train] == [r["id"] for r in job.stream[0].train]
    # 50 percent of the 8 rows of the first task, drawn by the memory's own rule.
    assert collections.Counter(ids) == collections.Counter(
        r["id"] for r in [*job.stream[1].train, *job.memory[0]]
    )
    assert len(ids) == 12
    # Two epochs of 12 rows in batches of 4, each row once an epoch.
    assert batches.total_steps(len(ids), job.cfg.train) == 6
    for epoch in range(2):
        read = [jobs.train_batch(job, second, 3 * epoch + s)[1] for s in (1, 2, 3)]
        assert sorted(e.id for batch in read for e in batch) == sorted(ids)


def test_multitask_is_one_training_on_the_union(lessons):
    job = lessons.job("multitask")
    nothing, logged = lessons.train(job, 0, lessons.start(job))
    assert not logged and jobs.lesson(job, 0).train == []
    same(nothing.state.delta, jobs.fresh(job))
    union = [r["id"] for task in job.stream for r in task.train]
    assert [e.id for e in jobs.lesson(job, 1).train] == union
    _, logged = lessons.train(job, 1, nothing)
    assert len([row for _, row in logged if "loss" in row]) == 8


@pytest.mark.slow
def test_scores_of_multitask_are_those_after_the_last_task(tmp_path, monkeypatch):
    runs = Runs(tmp_path, "multitask")
    runs.cfg = dataclasses.replace(
        runs.cfg, eval=dataclasses.replace(runs.cfg.eval, fwt=True)
    )
    results, folder = runs("run", monkeypatch)
    assert results["fwt"] is None and not (tmp_path / ".single").exists()
    assert results["matrix"][0] == [None, None]
    assert results["op"] == np.mean(results["matrix"][1])
    assert results["bwt"] is None and results["work"]["steps"] == 8
    assert list(adapters(folder)) == [f"01-{TASKS[1]}"]


def test_single_keeps_what_each_task_alone_gives(lessons):
    job = lessons.job("single")
    first, _ = lessons.train(job, 0, lessons.start(job))
    second, _ = lessons.train(job, 1, first)
    # Task 1 as the first of a stream, without any earlier one.
    plain = lessons.job("sequential")
    for number, place in enumerate([first, second]):
        alone, _ = lessons.train(plain, number, lessons.start(plain))
        same(alone.state.delta, place.state.delta)
        same(run.adapter(job, second, number), alone.state.delta)


def test_aim_merges_from_the_last_merge_and_starts_anew_with_a_task():
    """Names stand for adapters, which the hooks only hand on."""
    options = make("aim", interval=2, rehearsal=3).method
    method, asked, fused = aim.make(options), [], []

    def rehearse(state, memo, step, count):
        asked.append((step, count))
        return state._replace(delta="out", adam="rehearsed"), [2.0] * count

    def fuse(*given):
        fused.append(given)
        return f"fused {len(fused)}", 6.0

    tools = methods.Tools(1, 4, rehearse, fuse, None, None)
    state = steps.State("begin", "own", 0, 8, None)
    memo = methods.Memo({"origin": "of the last task"}, controller.Controller(9, 9, 9))
    state, memo = method.before_task(tools, state, memo)
    assert memo == ({"origin": "begin"}, controller.start(options))
    # Two losses make the threshold, which the third reaches.
    for step in range(1, 7):
        state = state._replace(delta=f"inner {step}", adam="own")
        signals = methods.Signals(step, 8, 0.0, 0.0, 0.0, 0.0, 1.0)
        nothing = tools._replace(remembered=0)
        assert method.after_step(nothing, state, memo, signals) == (state, memo, None)
        now, memo, record = method.after_step(tools, state, memo, signals)
        if step % 3:
            assert now is state and record is None
            continue
        assert (now.delta, now.adam) == (f"fused {step // 3}", "rehearsed")
        assert memo.arrays == {"origin": now.delta}
        assert (record["learning"], record["next_planned"]) == (3.0, step + 2)
    assert asked == [(3, 3), (6, 3)]
    assert fused == [
        ("begin", "inner 3", "out", 0.6, 0.4),
        ("fused 1", "inner 6", "out", 0.6, 0.4),
    ]


def test_the_one_merge_at_the_end_rehearses_at_a_rate_above_0():
    cfg = make("aim")
    method = aim.make(dataclasses.replace(cfg.method, merge_at_end=True))
    rates = []

    def rehearse(state, memo, step, count):
        rates.append(float(steps.learning_rate(state.step, state.total, cfg.train)))
        return state, [2.0] * count

    tools = methods.Tools(1, 4, rehearse, lambda *given: ("fused", 6.0), None, None)
    state = steps.State("inner", "own", 8, 8, None)
    memo = method.start("begin", 2)
    signals = methods.Signals(8, 8, 0.0, 0.0, 0.0, 0.0, 1.0)
    now, _, record = method.after_step(tools, state, memo, signals)
    assert record and now == state._replace(delta="fused")
    # The rate falls from step 1 to 0 at step 8; this is that of step 4.
    assert rates == [pytest.approx(cfg.train.learning_rate * 4 / 7)]


def test_a_rehearsal_that_is_not_finite_names_its_rows(lessons):
    """No step comes after the last one, whose loss would tell."""
    job = lessons.job("aim")
    task, place = jobs.lesson(job, 1), lessons.start(job)
    broken = jax.tree.map(lambda x: x + np.nan, place.state.delta)
    state = place.state._replace(delta=broken)
    rows = ", ".join(e.id for e in jobs.memory_batch(job, task, [(3, 1)])[1][0])
    with pytest.raises(
        aim_jax.InputError,
        match=f"step 3: loss of rehearsal not finite on the rows {rows}",
    ):
        run._tools(job, task).rehearse(state, place.memo, 3, 2)


@pytest.mark.parametrize("name", ["single", "ties"])
def test_adapters_of_one_task_are_validated_as_single_task_runs(name, lessons):
    job = lessons.job(name)
    train = dataclasses.replace(job.cfg.train, single_holdout=0.0)
    job = dataclasses.replace(job, cfg=dataclasses.replace(job.cfg, train=train))
    for number, task in enumerate(job.stream):
        ours, alone = jobs.lesson(job, number), jobs.alone(job, task)
        for split in ("train", "validation"):
            ids = [[e.id for e in getattr(x, split)] for x in (ours, alone)]
            assert ids[0] == ids[1] and ids[0]


def quadratic(delta, anchor, fisher):
    """Sum of F (theta - theta*)^2 in float64."""
    terms = jax.tree.map(
        lambda x, a, f: np.sum(np.float64(f) * (np.float64(x) - np.float64(a)) ** 2),
        delta,
        anchor,
        fisher,
    )
    return sum(jax.tree.leaves(terms))


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape)), tree)


@pytest.mark.parametrize("name", ["ewc", "l2"])
def test_the_penalty_is_quadratic_and_so_is_its_gradient(name, lessons):
    job = lessons.job(name, strength=3.0)
    delta, anchor, fisher = (random_like(jobs.fresh(job), i) for i in range(3))
    if name == "l2":
        fisher = jax.tree.map(lambda x: np.float32(1), fisher)
    arrays = {"fisher": fisher, "anchor": anchor}
    value, grads = jax.value_and_grad(job.method.penalty)(delta, arrays)
    assert float(value) == pytest.approx(1.5 * quadratic(delta, anchor, fisher), 1e-5)
    jax.tree.map(
        lambda g, x, a, f: np.testing.assert_allclose(
            g, 3 * f * (x - a), rtol=1e-4, atol=1e-5
        ),
        grads,
        delta,
        anchor,
        fisher,
    )
    assert float(job.method.penalty(delta, job.method.start(delta, 2).arrays)) == 0


def test_ewc_measures_squared_gradients_of_single_rows(lessons):
    """F against one gradient a row, through another function of the loss."""
    job = lessons.job("ewc", normalize=False)
    task = jobs.lesson(job, 0)._replace(train=jobs.lesson(job, 0).train[:3])
    place = lessons.start(job)
    delta = random_like(place.state.delta, 0)
    delta = jax.tree.map(lambda x: 0.1 * x, delta)
    state = place.state._replace(delta=delta)
    _, memo = job.method.after_task(run._tools(job, task), state, place.memo)

    def loss(delta, example):
        batch = batches.collate(job.text, [[example]], 1)
        return job.steps.validate(job.base.params, delta, batch)

    expected = jax.tree.map(np.zeros_like, delta)
    for example in task.train:
        grads = jax.grad(loss)(delta, example)
        expected = jax.tree.map(lambda e, g: e + np.square(g) / 3, expected, grads)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * scale),
        memo.arrays["fisher"],
        expected,
    )
    same(memo.arrays["anchor"], delta)


@pytest.mark.parametrize("normalize", [False, True])
def test_ewc_adds_up_what_tasks_measure(normalize):
    method = ewc.make(ewc.Options(fisher_rows=7, normalize=normalize))
    deltas, measured = ([adapter(i + j) for i in range(2)] for j in (0, 10))
    measured = [jax.tree.map(np.square, tree) for tree in measured]
    left = iter(measured)

    def fisher(state, memo, rows):
        assert rows == 7
        return next(left)

    memo, tools = method.start(deltas[0], 2), methods.Tools(0, 0, *[None] * 3, fisher)
    for delta in deltas:
        state = steps.State(delta, None, 0, 1, None)
        same_state, memo = method.after_task(tools, state, memo)
        assert same_state is state
    whole = [ewc.normalized(tree) if normalize else tree for tree in measured]
    same(memo.arrays["fisher"], jax.tree.map(np.add, *whole))
    same(memo.arrays["anchor"], deltas[1])


def test_l2_holds_from_the_second_task_on():
    method, (first, second) = l2.make(l2.Options(strength=3.0)), map(adapter, (0, 1))
    memo = method.start(first, 2)
    assert float(method.penalty(second, memo.arrays)) == 0
    _, memo = method.after_task(None, steps.State(first, None, 0, 1, None), memo)
    one = jax.tree.map(lambda x: np.float32(1), first)
    expected = 1.5 * quadratic(second, first, one)
    assert float(method.penalty(second, memo.arrays)) == pytest.approx(expected, 1e-5)


def test_fisher_has_mean_one():
    tree = {"a": np.float32([1, 2]), "b": np.float32([[3]])}
    found = ewc.normalized(tree)
    np.testing.assert_allclose(found["a"], [0.5, 1.0])
    np.testing.assert_allclose(found["b"], [[1.5]])
    zero = jax.tree.map(np.zeros_like, tree)
    same(ewc.normalized(zero), zero)


def test_a_penalty_is_added_to_the_mean_loss_once_a_step(lessons):
    """Moments of the first update hold clip * (gradient of the loss + of the penalty)."""
    job, plain = lessons.job("l2", strength=0.5), lessons.job("sequential")
    place = lessons.start(job)
    state = place.state._replace(total=np.int32(4))
    anchor = jax.tree.map(lambda x: x + 0.1, state.delta)
    one = jax.tree.map(lambda x: np.float32(1), anchor)
    arrays = {"fisher": one, "anchor": anchor}
    batch, _ = jobs.train_batch(job, jobs.lesson(job, 0), 1)
    after, measures = job.steps.train(job.base.params, state, arrays, batch)
    bare, alone = plain.steps.train(job.base.params, state, (), batch)
    assert float(measures["loss"]) == pytest.approx(float(alone["loss"]), rel=1e-6)
    total = sum(x.size for x in jax.tree.leaves(anchor))
    assert float(measures["penalty"]) == pytest.approx(0.25 * 0.01 * total, rel=1e-4)

    def unclipped(state, measures):
        clip = min(1.0, 1 / (float(measures["grad_norm"]) + 1e-6))
        return jax.tree.map(lambda m: m / 0.1 / clip, state.adam.mu)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y - 0.05, rtol=1e-3, atol=1e-5),
        unclipped(after, measures),
        unclipped(bare, alone),
    )


def product(delta):
    """B A of every module, in float64."""
    return lora.map_modules(lambda a, b: np.float64(b) @ np.float64(a), delta)


def test_inc_lora_keeps_each_adapter_in_its_place():
    method, trees = inc_lora.make(inc_lora.Options()), [adapter(i) for i in range(3)]
    tools = methods.Tools(0, 0, None, None, lambda number: trees[number], None)
    state, memo = steps.State(trees[0], None, 0, 1, None), method.start(trees[0], 3)
    for number in range(3):
        tools = tools._replace(number=number)
        state, memo = method.before_task(tools, state, memo)
        assert state.delta is trees[number]
    same(memo.arrays["past"], lora.concatenate(*trees[:2]))


@pytest.mark.slow
def test_inc_lora_sums_frozen_adapters(lessons):
    job, plain = lessons.job("inc_lora"), lessons.job("sequential")
    begun = lessons.start(job)
    # In the first task what is beside its adapter is zero, and gives the same gradients.
    batch, _ = jobs.train_batch(job, jobs.lesson(job, 0), 1)
    state = begun.state._replace(total=np.int32(4))
    ours, _ = job.steps.train(job.base.params, state, begun.memo.arrays, batch)
    theirs, _ = plain.steps.train(job.base.params, state, (), batch)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7),
        ours.adam.mu,
        theirs.adam.mu,
    )
    first, _ = lessons.train(job, 0, begun)
    second, _ = lessons.train(job, 1, first)
    whole = run.adapter(job, second, 1)
    jax.tree.map(
        lambda x, y, z: np.testing.assert_allclose(x, y + z, atol=1e-6),
        product(whole),
        product(first.state.delta),
        product(second.state.delta),
    )
    # A of the new adapter began elsewhere, and the first one moved no more.
    same(second.memo.arrays["past"], first.state.delta)
    assert not jax.tree.all(
        jax.tree.map(np.array_equal, jobs.fresh(job, 1), jobs.fresh(job, 0))
    )


def test_an_adapter_of_higher_rank_is_exported_at_its_scale(lessons, tmp_path):
    job = lessons.job("inc_lora")
    for cfg in (job.cfg.lora, dataclasses.replace(job.cfg.lora, use_rslora=True)):
        wide = random_like(lora.widen(jobs.fresh(job), 3), 0)
        hf.save_adapter(tmp_path, wide, job.base.keys, cfg, "embedded")
        found, settings = hf.load_adapter(tmp_path, job.base.params, job.base.keys)
        same(found, wide)
        assert settings.r == 3 * cfg.r
        assert lora.scale(settings) == pytest.approx(lora.scale(cfg), rel=1e-6)


@pytest.mark.parametrize("measure", ["l1", "frobenius"])
def test_olora_penalises_overlap_with_every_earlier_adapter(measure, lessons):
    job = lessons.job("olora", orthogonal=0.7, norm=0.3, measure=measure)
    delta = random_like(jobs.fresh(job), 0)
    earlier = [random_like(delta, i) for i in (1, 2)]
    past = lora.widen(delta, 3)  # the third is yet to come
    for number, old in enumerate(earlier):
        past = lora.put_part(past, number, old)
    power = 1 if measure == "l1" else 2
    expected = 0.0
    for module in modules(delta):
        a, b = (np.float64(x) for x in module)
        for layer in np.ndindex(*a.shape[:-2]):
            expected += 0.3 * (np.linalg.norm(a[layer]) + np.linalg.norm(b[layer]))
    for old in earlier:
        for (a, _), (before, _) in zip(modules(delta), modules(old), strict=True):
            for layer in np.ndindex(*a.shape[:-2]):
                overlap = np.float64(before[layer]) @ np.float64(a[layer]).T
                expected += 0.7 * np.sum(np.abs(overlap) ** power)
    value = job.method.penalty(delta, {"past": past})
    assert float(value) == pytest.approx(expected, rel=1e-5)
    # B begins at 0, where a norm has no gradient.
    grads = jax.grad(job.method.penalty)(jobs.fresh(job), {"past": past})
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def modules(delta):
    """(a, b) of every module, in the order of the tree."""
    found = []
    lora.map_modules(lambda a, b: found.append((a, b)), delta)
    return found


@pytest.mark.parametrize("random", [False, True])
def test_migu_keeps_the_rows_of_large_outputs(random, lessons):
    job = lessons.job("migu", quantile=0.7, random=random)
    state = lessons.start(job).state
    grads, sizes = random_like(state.delta, 0), lora.units(state.delta)
    sizes = jax.tree.map(np.abs, random_like(sizes, 1))
    tools = methods.Tools(0, 0, None, None, None, None)

    def masked(number, state):
        _, memo = job.method.before_task(
            tools._replace(number=number), state, methods.Memo()
        )
        found, carry = job.method.gradients(state, grads, sizes, memo.arrays, False)
        assert carry == ()
        return found

    same(masked(0, state), grads)  # the first task is trained as ever
    found = masked(1, state)
    for g, n, f in zip(*map(jax.tree.leaves, (grads, sizes, found)), strict=True):
        for layer in np.ndindex(n.shape[:-1]):
            kept = np.any(f[layer] != 0, -1)
            np.testing.assert_array_equal(f[layer], g[layer] * kept[:, None])
            # Of 8 rows, those above 0.7 of the way from rank 0 to rank 7.
            assert kept.sum() == len(kept) - np.ceil(0.7 * (len(kept) - 1))
            largest = kept == (n[layer] >= np.sort(n[layer])[-kept.sum()])
            assert largest.all() == (not random)
    later = state._replace(adam=state.adam._replace(count=state.adam.count + 1))
    changed = [
        np.any((x != 0) != (y != 0))
        for x, y in zip(*map(jax.tree.leaves, (found, masked(1, later))), strict=True)
    ]
    assert any(changed) == random


def test_replay_interval_rehearses_every_so_many_steps(lessons):
    job = lessons.job("replay_interval", interval=3, rehearsal=2)
    calls = []

    def rehearse(state, memo, step, count):
        calls.append((step, count))
        return state._replace(step=-1), [0.0] * count

    def after(remembered):
        tools = methods.Tools(1, remembered, rehearse, None, None, None)
        for step in range(1, 8):
            signals = methods.Signals(step, 7, 0.0, 0.0, 0.0, 0.0, None)
            state, _, record = job.method.after_step(
                tools, lessons.start(job).state, methods.Memo(), signals
            )
            assert record is None
            assert (int(state.step) == -1) == bool(remembered and step % 3 == 0)

    after(0)
    assert not calls
    after(4)
    assert calls == [(3, 2), (6, 2)]


def importance(thetas, gradients, second=False):
    """AdaLoRA's importance of every entry of one leaf after some steps, in float64."""
    mean = spread = 0.0
    for theta, gradient in zip(thetas, gradients, strict=True):
        value = np.float64(theta) * np.float64(gradient)
        value = np.abs(value - 0.5 * value**2 if second else value)
        mean = 0.85 * mean + 0.15 * value
        spread = 0.85 * spread + 0.15 * np.abs(value - mean)
    return mean * spread


def from_0_to_1(values):
    return (values - values.min()) / (values.max() - values.min())


def seen(method, state, thetas, gradients, rehearsal=False):
    """The state whose carry has seen these adapters and gradients."""
    for theta, gradient in zip(thetas, gradients, strict=True):
        now = state._replace(delta=theta)
        same_gradient, carry = method.gradients(now, gradient, None, None, rehearsal)
        assert same_gradient is gradient
        state = state._replace(carry=carry)
    return state


@pytest.mark.parametrize("unit", ["matrix", "rank"])
def test_tasl_merges_by_the_importance_of_units(unit, lessons):
    job = lessons.job("tasl", unit=unit)
    begun = lessons.start(job)
    memo, past, before, cases = begun.memo, None, None, set()
    rng = np.random.default_rng(0)
    for number in range(4):
        trees = [random_like(begun.state.delta, 100 * number + i) for i in range(7)]
        # Units of a range of sizes, so that some are high.
        trees = [
            jax.tree.map(lambda x: x * np.float32(rng.gamma(0.5)), t) for t in trees
        ]
        thetas, gradients, delta = trees[:3], trees[3:6], trees[6]
        fresh = begun.state._replace(carry=job.method.carry(delta))
        state = seen(job.method, fresh, thetas, gradients)
        tools = methods.Tools(number, 0, None, None, None, None)
        state, memo = job.method.after_task(tools, state._replace(delta=delta), memo)

        # (unit, leaf, place) of all units; and both leaves of a pair.
        units, places = [], []
        for m in range(len(modules(delta))):
            a, b = (
                importance(
                    [modules(t)[m][k] for t in thetas],
                    [modules(t)[m][k] for t in gradients],
                    unit == "rank",
                )
                for k in range(2)
            )
            for layer in np.ndindex(a.shape[:-2]):
                if unit == "matrix":
                    units += [a[layer].mean(), b[layer].mean()]
                    places += [[(m, 0, layer)], [(m, 1, layer)]]
                    continue
                for r in range(a.shape[-2]):
                    units.append(np.outer(b[layer][:, r], a[layer][r]).mean())
                    places.append(
                        [(m, 0, (*layer, r)), (m, 1, (*layer, slice(None), r))]
                    )
        now = from_0_to_1(np.array(units))
        if number == 0:
            same(state.delta, delta)
            past, before = now, delta
            continue
        for u, where in enumerate(places):
            high = now[u] > np.quantile(now, 0.8), past[u] > np.quantile(past, 0.8)
            share = {(1, 1): 0.3, (1, 0): 1.0, (0, 1): 0.0, (0, 0): 0.5}[high]
            cases.add(high)
            if unit == "rank":
                new, old = np.exp(now[u] / 0.25), np.exp(past[u] / 0.25)
                share = new / (new + old)
            for m, side, place in where:
                new, old, found = (
                    modules(t)[m][side][place] for t in (delta, before, state.delta)
                )
                np.testing.assert_allclose(
                    found, share * new + (1 - share) * old, rtol=1e-3, atol=1e-5
                )
        past, before = from_0_to_1(0.3 * now + 0.7 * past), state.delta
    assert len(cases) >= 3


@pytest.mark.parametrize("soft", [False, True])
def test_recurrent_kif_merges_by_the_importance_of_entries(soft, lessons):
    job = lessons.job("recurrent_kif", interval=3, rehearsal=2, soft=soft)
    begun = lessons.start(job)
    origin = random_like(begun.state.delta, 0)
    state, memo = job.method.before_task(None, begun.state._replace(delta=origin), None)
    outer, asked, past, steps_of_task = random_like(origin, 1), [], [], []

    def rehearse(state, memo, step, count):
        trees = [random_like(origin, 1000 * step + i) for i in range(4)]
        past.append(trees)
        asked.append((step, count))
        state = seen(job.method, state, trees[:2], trees[2:], rehearsal=True)
        return state._replace(delta=outer), [2.0, 1.0]

    def flat(tree):
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    def score(thetas, gradients):
        return importance([flat(t) for t in thetas], [flat(g) for g in gradients])

    tools = methods.Tools(1, 4, rehearse, None, None, None)
    for step in range(1, 7):
        trees = [random_like(origin, 10 * step + i) for i in (2, 3, 4)]
        inner = trees[2]
        steps_of_task = [*steps_of_task, trees] if step % 3 != 1 else [trees]
        state = seen(job.method, state, trees[:1], trees[1:2])._replace(delta=inner)
        signals = methods.Signals(step, 6, 0.0, 0.0, 0.0, 0.0, None)
        now, memo, record = job.method.after_step(tools, state, memo, signals)
        if step % 3:
            assert now is state and record is None
            continue
        ours = score([t[0] for t in steps_of_task], [t[1] for t in steps_of_task])
        # The memory's importance goes on through the task.
        theirs = score(
            [t for trees in past for t in trees[:2]],
            [t for trees in past for t in trees[2:]],
        )
        if soft:
            new, old = (np.exp(from_0_to_1(x) / 0.25) for x in (ours, theirs))
            share = new / (new + old)
        else:
            high = [x > np.quantile(x, 0.8) for x in (ours, theirs)]
            share = np.select(
                [high[0] & high[1], high[0], high[1]], [0.4, 1.0, 0.0], 0.5
            )
        start, middle, end = map(flat, (origin, inner, outer))
        expected = start + share * (middle - start) + (1 - share) * (end - middle)
        # An entry at the quantile may fall on either side of it.
        off = ~np.isclose(flat(now.delta), expected, rtol=1e-3, atol=1e-4)
        assert off.sum() <= 2
        assert record["weights"][0] == pytest.approx(share.mean(), abs=1e-3)
        state = now
        origin = now.delta
        same(memo.arrays["origin"], now.delta)
        assert not any(x.any() for x in jax.tree.leaves(now.carry["task"]))
    assert asked == [(3, 2), (6, 2)]
    nothing = tools._replace(remembered=0)
    assert job.method.after_step(nothing, state, memo, signals)[0] is state


@pytest.mark.parametrize("name", ["forever", "step_ebbinghaus"])
def test_rehearsal_follows_the_clock(name, lessons):
    """Rehearsals and their beta against a plain loop over the rule."""
    job = lessons.job(name, calibration=4, rehearsal=3, gamma=2.0, beta=0.1)
    distances = np.random.default_rng(0).gamma(2.0, size=200)
    seen, time, speed, count = [], 0.0, 0.0, 0
    expected, days = [], [1, 2, 4, 7, 15, 30, 60, 120]
    for step, distance in enumerate(distances, 1):
        tick = distance if name == "forever" else 1.0
        time += tick
        if step == 4:
            day, first = time, time / 4
            speed = first
        elif step > 4:
            speed = 0.95 * speed + 0.05 * tick
        if step >= 4 and time >= days[count] * day:
            ratio = np.clip(1 + 2 * (speed / first - 1), 0.5, 3)
            expected.append((step, 3, 0.1 * ratio))
            count += 1

    def rehearse(state, memo, step, count):
        seen.append((step, count, float(memo.arrays["beta"])))
        return state._replace(step=-1), [0.0] * count

    tools = methods.Tools(1, 5, rehearse, None, None, None)
    place = lessons.start(job)
    begun, memo = job.method.before_task(tools, place.state, place.memo)
    for step, distance in enumerate(distances, 1):
        signals = methods.Signals(step, 200, 0, 0, 0, 0, None, float(distance))
        state, memo, _ = job.method.after_step(tools, begun, memo, signals)
        assert (state is begun) == (step not in {s for s, *_ in seen})
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    assert len(seen) >= 5
    if name == "step_ebbinghaus":
        assert [s for s, *_ in seen] == [4, 8, 16, 28, 60, 120]
    # A task begins at time 0, and its adapter is what rehearsals are held near.
    moved = begun._replace(delta=random_like(begun.delta, 0))
    anew = job.method.before_task(tools, moved, memo)[1]
    assert anew.host == place.memo.host
    arrays = anew.arrays | {"beta": np.float32(0.3)}
    one = jax.tree.map(lambda x: np.float32(1), begun.delta)
    penalty = job.method.rehearsal_penalty(begun.delta, arrays)
    expected = 0.3 * quadratic(begun.delta, moved.delta, one)
    assert float(penalty) == pytest.approx(expected, 1e-5)
    # Without a memory the clock goes, and nothing else happens.
    nothing = methods.Tools(0, 0, None, None, None, None)
    for step in range(1, 9):
        signals = methods.Signals(step, 8, 0, 0, 0, 0, None, 1.0)
        assert job.method.after_step(nothing, begun, memo, signals)[0] is begun


@pytest.mark.slow
def test_the_penalty_of_a_rehearsal(lessons):
    """Its gradient, 2 beta (theta - theta*), is added to that of the memory's loss."""
    job, plain = lessons.job("forever"), lessons.job("sequential")
    state = lessons.start(job).state._replace(total=np.int32(4))
    anchor = jax.tree.map(lambda x: x - 0.1, state.delta)
    arrays = {"anchor": anchor, "beta": np.float32(0.5)}
    task = jobs.lesson(job, 0)._replace(memory=jobs.lesson(job, 0).train)
    batch, _ = jobs.memory_batch(job, task, [(1, 1 + i) for i in range(run.CHUNK)])
    after, losses = job.steps.rehearse(job.base.params, state, arrays, batch, 1)
    bare, alone = plain.steps.rehearse(job.base.params, state, (), batch, 1)
    assert float(losses[0]) == pytest.approx(float(alone[0]), rel=1e-6)
    first, second = (
        np.concatenate([np.ravel(m) for m in jax.tree.leaves(s.adam.mu)])
        for s in (after, bare)
    )
    # Both are clipped to norm 1: what is left is the direction.
    batch1 = jax.tree.map(lambda x: x[0], batch)
    _, measures = plain.steps.train(job.base.params, state, (), batch1)
    norm = float(measures["grad_norm"])
    whole = second * 10 * max(1.0, norm) + 0.1
    whole /= max(1.0, np.linalg.norm(whole))
    np.testing.assert_allclose(first * 10, whole, rtol=1e-3, atol=1e-5)
