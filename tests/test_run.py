"""The main job on small streams: results, resume, compilations, speculation, bad input."""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import types

import crash
import jax
import numpy as np
import pytest
import safetensors.numpy

import aim_jax
from aim_jax import checkpoint, config, jobs, logs, parallel, records, rescore, run
from aim_jax.data import batches, synthetic
from aim_jax.methods import aim, sequential, single, step_ebbinghaus
from aim_jax.models import hf

TASKS = synthetic.STREAM[:3]
SIZES = (synthetic.TRAIN, synthetic.DEV, synthetic.TEST)


def make(method=None, **changes):
    """A config of a three-task stream that trains in seconds."""
    cfg = config.Config(
        data=config.Data(
            tasks=TASKS,
            limit_train=24,
            limit_dev=4,
            limit_test=8,
            buckets=(64,),
            target_buckets=(8,),
        ),
        memory=config.Memory(percent=25.0, batch_size=4),
        train=config.Train(
            epochs=2, batch_size=4, learning_rate=3e-3, warmup_steps=2, eval_every=6
        ),
        method=method or aim.Options(interval=2, rehearsal=2, threshold_factor=1.0),
        eval=config.Eval(fwt=False, batch_size=8, max_length=8),
        logs=config.Logs(progress=False),
    )
    for path, value in changes.items():
        section, field = path.split("__")
        part = dataclasses.replace(getattr(cfg, section), **{field: value})
        cfg = dataclasses.replace(cfg, **{section: part})
    return config.resolve(cfg)


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def events(folder):
    """(name, step) -> value in the TensorBoard files of a folder."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = {}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:  # length, checksum, event, checksum
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            data = data[16 + size :]
    return found


def adapter(folder, number):
    (path,) = (folder / "adapters").glob(f"{number:02d}-*/adapter_model.safetensors")
    return safetensors.numpy.load_file(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with single-task runs."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run.run(make(eval__fwt=True), folder)


def test_results_and_files(whole):
    folder, results = whole
    assert results == json.loads((folder / "results.json").read_text())
    matrix = results["matrix"]
    assert [[v is None for v in row] for row in matrix] == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]
    assert results["op"] == pytest.approx(np.mean(matrix[2]))
    assert results["bwt"] == pytest.approx(
        np.mean([matrix[2][j] - matrix[j][j] for j in range(2)])
    )
    assert results["fwt"] == pytest.approx(
        np.mean([matrix[j][j] - results["single"][j] for j in range(3)])
    )
    assert len(list((folder.parent / ".single").glob("*.jsonl"))) == 3
    for j, task in enumerate(TASKS):
        made = rows(folder / "predictions" / "single", f"{task}.jsonl")
        assert np.mean([r["score"] for r in made]) == pytest.approx(
            results["single"][j]
        )
    for i in range(3):
        names = {f"{t}.jsonl" for t in TASKS[: i + 1]}
        found = folder / "predictions" / f"{i:02d}-{TASKS[i]}"
        assert {p.name for p in found.iterdir()} == names
        for j, task in enumerate(TASKS[: i + 1]):
            made = rows(found, f"{task}.jsonl")
            assert len(made) == 8
            assert np.mean([r["score"] for r in made]) == pytest.approx(matrix[i][j])
    assert (folder / "report.html").is_file()


def test_metrics_and_merges_tell_the_trajectory(whole):
    folder, _ = whole
    steps = [r for r in rows(folder, logs.METRICS) if "loss" in r]
    assert [r["step"] for r in steps] == [*range(1, 13)] * 3
    assert all(r["history"] is None for r in steps if r["task"] == 0)
    assert all(math.isfinite(r["history"]) for r in steps if r["task"] > 0)
    merges = rows(folder, logs.MERGES)
    assert {r["task"] for r in merges} == {1, 2}
    marked = {(r["task"], r["step"]) for r in steps if r["merged"]}
    assert marked == {(r["task"], r["step"]) for r in merges}
    validations = [r["step"] for r in rows(folder, logs.METRICS) if "validation" in r]
    assert validations == [6, 12] * 3


def test_a_finished_run_says_so_and_computes_nothing(whole, capsys, monkeypatch):
    folder, results = whole
    monkeypatch.setattr(jobs, "prepare", None)
    assert run.run(make(eval__fwt=True), folder) == results
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("task, step", [(0, 3), (1, 7)])
def test_a_stopped_run_ends_as_the_unbroken_one(
    whole, tmp_path, monkeypatch, task, step
):
    folder = tmp_path / "stopped"
    real, seen = run._read, []

    def interrupted(number, *args):
        seen.append(number)
        if seen.count(1) == task + 1 and number == step:
            raise KeyboardInterrupt
        return real(number, *args)

    cfg = make(checkpoint__steps=5)
    monkeypatch.setattr(run, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run(cfg, folder)
    before = len(seen)
    monkeypatch.setattr(run, "_read", lambda *args: seen.append(0) or real(*args))
    results = run.run(cfg, folder)
    # It went on from the checkpoint before the stop, not from the start.
    assert len(seen) - before == 36 - (12 * task + (step - 1) // 5 * 5)
    assert results["matrix"] == whole[1]["matrix"]
    assert results["work"] == whole[1]["work"]
    for name in (logs.METRICS, logs.MERGES):
        assert rows(folder, name) == rows(whole[0], name)
    for number in range(3):
        ours, theirs = adapter(folder, number), adapter(whole[0], number)
        assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)


def test_killed_and_preempted_it_ends_as_the_unbroken_one(whole, tmp_path):
    folder = tmp_path / "killed" / "run"
    strikes = [
        ("step", 5, 0.0, signal.SIGTERM),
        ("evaluate", 2, 0.01, signal.SIGTERM),
        ("save", 2, random.uniform(0, 0.05), signal.SIGKILL),
        ("rehearse", 2, random.uniform(0, 0.05), signal.SIGKILL),
    ]
    for phase, count, delay, number in strikes:
        process = crash.Process(folder, "checkpoint.steps=2")
        assert process.strike(phase, count, delay, number), phase
        code, errors = process.end()
        if number == signal.SIGKILL:
            assert code == -number
        else:
            assert code == 0 and "the same command goes on from here" in errors
            assert not (folder / "results.json").exists() or phase == "evaluate"
    code, errors = crash.Process(folder).end()
    assert code == 0, errors
    assert not crash.differences(crash.outcome(folder), crash.outcome(whole[0]))


@pytest.mark.slow
def test_twenty_random_kills_lose_nothing(tmp_path):
    struck, _ = crash.random_kills(tmp_path, 20, random.randrange(1000))
    assert struck.total() == 20


def plain(**changes):
    options = sequential.Options(name="sequential")
    return make(options, train__select="last", **changes)


@pytest.fixture(scope="module")
def sequence(tmp_path_factory):
    """Two tasks one after the other, nothing carried over but the adapter."""
    folder = tmp_path_factory.mktemp("sequence") / "whole"
    return folder, run.run(plain(data__tasks=TASKS[:2]), folder)


def test_a_stream_that_starts_from_an_adapter(sequence, tmp_path):
    """The second task from the first one's adapter is the second task of both."""
    start = next((sequence[0] / "adapters").glob("00-*"))
    cfg = plain(data__tasks=TASKS[1:2], lora__path=str(start))
    results = run.run(cfg, tmp_path / "second")
    ours, theirs = adapter(tmp_path / "second", 0), adapter(sequence[0], 1)
    assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)
    assert results["matrix"] == [[sequence[1]["matrix"][1][1]]]
    # Begun with another adapter, a run is not gone on with.
    other = shutil.copytree(sequence[0] / "adapters" / f"01-{TASKS[1]}", tmp_path / "o")
    cfg = plain(data__tasks=TASKS[1:2], lora__path=str(other))
    jobs.write(jobs.prepare(cfg, tmp_path / "begun"))
    shutil.copytree(tmp_path / "second" / "checkpoints", tmp_path / "begun/checkpoints")
    with pytest.raises(aim_jax.InputError, match="lora.path .*changed since"):
        run.run(cfg, tmp_path / "begun")


def test_no_epochs_evaluate_an_adapter(sequence, tmp_path):
    folder, both = sequence
    start = next((folder / "adapters").glob("01-*"))
    last = both["matrix"][1]
    for method in (sequential.Options(), single.Options()):
        changes = {"data__tasks": TASKS[:2], "train__epochs": 0}
        cfg = make(method, **changes, lora__path=str(start))
        results = run.run(cfg, tmp_path / method.name)
        assert results["matrix"] == [[last[0], None], last]
        assert "steps" not in results["work"]
        assert (tmp_path / method.name / "report.html").is_file()
        ours, theirs = adapter(tmp_path / method.name, 0), adapter(folder, 1)
        assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)


def test_an_adapter_of_other_settings(sequence, tmp_path, monkeypatch):
    """The error says what to set, before weights are read; nothing is written."""
    monkeypatch.setattr(hf, "load", None)
    with pytest.raises(aim_jax.InputError, match="lora.target: no module 'q_proj'"):
        run.run(plain(lora__target=("q_proj",)), tmp_path / "run")
    start = next((sequence[0] / "adapters").glob("00-*"))
    cfg = plain(lora__path=str(start), lora__r=4, lora__target=("q",))
    with pytest.raises(
        aim_jax.InputError, match="--set lora.target=q,v --set lora.r=8$"
    ):
        run.run(cfg, tmp_path / "run")
    cfg = plain(lora__path=str(tmp_path))
    with pytest.raises(aim_jax.InputError, match="adapter_config.json: No such file"):
        run.run(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_speculation_gives_the_plain_trajectory_bitwise(whole, tmp_path):
    run.run(make(parallel__speculate=False), tmp_path / "plain")
    for name in (logs.METRICS, logs.MERGES):
        assert rows(tmp_path / "plain", name) == rows(whole[0], name)
    ours, theirs = adapter(tmp_path / "plain", 2), adapter(whole[0], 2)
    assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)


def test_sequential_is_the_run_without_memory_and_merges(whole, tmp_path):
    folder, held = tmp_path / "sequential", tmp_path / "held"
    (held / "test").mkdir(parents=True)
    for name in synthetic.STREAM[3:]:
        made = synthetic.task(name, 1, *SIZES)["test"]
        (held / "test" / f"{name}.json").write_text(json.dumps(made))
    more = {"eval__before_after": (str(held),), "logs__tensorboard": True}
    results = run.run(make(sequential.Options(), **more), folder)
    assert not (folder / logs.MERGES).exists()
    steps = [r for r in rows(folder, logs.METRICS) if "loss" in r]
    assert all(r["history"] is None and not r["merged"] for r in steps)
    # What was held out is scored by the base and by the end of the stream.
    assert set(results["before_after"]) == {"before", "after"}
    texts = []
    for when, scores in results["before_after"].items():
        assert list(scores) == sorted(synthetic.STREAM[3:])
        for name, score in scores.items():
            made = rows(folder / "predictions" / when, f"{name}.jsonl")
            assert len(made) == 8
            assert score == pytest.approx(np.mean([r["score"] for r in made]))
            texts.append([r["prediction"] for r in made])
    assert texts[:2] != texts[2:], "the base and the adapter answer alike"
    # Event files hold the numbers of metrics.jsonl, on the steps of the stream.
    shown = events(folder / "tensorboard")
    assert [shown["metrics/loss", i] for i in range(1, 37)] == [
        pytest.approx(r["loss"]) for r in steps
    ]
    assert shown[f"score/{TASKS[0]}", 36] == pytest.approx(results["matrix"][2][0])
    # The first task has no memory, so both methods train it alike.
    ours, theirs = adapter(folder, 0), adapter(whole[0], 0)
    assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)
    assert not np.array_equal(
        *(list(adapter(f, 2).values())[0] for f in (folder, whole[0]))
    )


def test_the_memory_is_saved_and_another_run_replays_it(whole, tmp_path):
    folder, _ = whole
    kept = {p.name: rows(p.parent, p.name) for p in (folder / "memory").iterdir()}
    assert sorted(kept) == [f"{i:02d}-{name}.jsonl" for i, name in enumerate(TASKS[:2])]
    for i in range(2):  # 25 percent of 24 rows
        chosen = kept[f"{i:02d}-{TASKS[i]}.jsonl"]
        train = synthetic.task(TASKS[i], 0, *SIZES)["train"][:24]
        assert len(chosen) >= 6 and all(row in train for row in chosen)
    # Neither field counts any more, so the same rows come from the files.
    cfg = make(memory__replay=str(folder), memory__percent=0, memory__rule="exact")
    run.run(cfg, tmp_path / "again")
    ours, theirs = adapter(tmp_path / "again", 2), adapter(folder, 2)
    assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)


def test_a_memory_that_lacks_a_task_or_is_broken_is_named(whole, tmp_path):
    shutil.copytree(whole[0] / "memory", tmp_path / "memory")
    cfg = make(memory__replay=str(tmp_path))
    file = tmp_path / f"memory/01-{TASKS[1]}.jsonl"
    file.write_text('{"input": "a\u2028", "output": "b"}\n{"input"\n', "utf-8")
    with pytest.raises(aim_jax.InputError, match=f"01-{TASKS[1]}.jsonl: row 1 .*JSON"):
        jobs.prepare(cfg, tmp_path / "run")
    file.write_bytes(b'{"input": "\xff", "output": "b"}\n')
    with pytest.raises(aim_jax.InputError, match=f"01-{TASKS[1]}.jsonl: not UTF-8"):
        jobs.prepare(cfg, tmp_path / "run")
    file.unlink()
    with pytest.raises(aim_jax.InputError, match=f"no NN-{TASKS[1]}.*{TASKS[0]}"):
        jobs.prepare(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_results_tell_which_rows_were_used(whole):
    assert whole[1]["rows"] == {
        name: {
            "train": 24,
            "dev": 4,
            "test": 8,
            "dev_in_test": 0,
            "dropped": 0,
            "held_out": 0,
        }
        for name in TASKS
    }


@pytest.mark.parametrize("leaks", [True, False])
def test_dev_rows_that_are_test_rows_validate_where_they_may(
    leaks, tmp_path, monkeypatch
):
    real = synthetic.task

    def leaky(name, *args):
        splits = real(name, *args)
        return splits | {"dev": splits["test"][:2] + splits["dev"]}

    monkeypatch.setattr(synthetic, "task", leaky)
    job = jobs.prepare(make(train__validation_leaks=leaks), tmp_path)
    used = [job.usage[TASKS[0]][k] for k in ("dev", "dev_in_test", "dropped")]
    assert used == ([4, 2, 0] if leaks else [2, 0, 2])
    held = {e.id for e in jobs.lesson(job, 0).validation}
    assert bool(held & {row["id"] for row in job.stream[0].test}) == leaks


def test_results_tell_what_training_took(whole):
    folder, results = whole
    work = results["work"]
    steps = [r for r in rows(folder, logs.METRICS) if "loss" in r]
    merges = rows(folder, logs.MERGES)
    assert work["steps"] == len(steps) == 36
    assert work["probes"] == sum(r["history"] is not None for r in steps) == 24
    assert work["rehearsal_steps"] == sum(r["rehearsal"] for r in merges) > 0
    # Every row is read once an epoch, and there are two.
    text = jobs.prepare(make(), folder.parent / "unused").text
    read = [
        batches.tokens(batches.encode(text, synthetic.task(n, 0, *SIZES)["train"][:24]))
        for n in TASKS
    ]
    assert work["train_tokens"] == 2 * sum(read)
    kept = [r for p in (folder / "memory").iterdir() for r in rows(p.parent, p.name)]
    sizes = [batches.tokens([e]) for e in batches.encode(text, kept)]
    for kind in ("probe", "rehearsal"):  # four rows a batch
        count = work["probes" if kind == "probe" else "rehearsal_steps"]
        assert min(sizes) * 4 <= work[f"{kind}_tokens"] / count <= max(sizes) * 4
    # The origin of the next merge, float32, and the rows kept.
    held = sum(4 * x.size for x in adapter(folder, 2).values())
    held += sum(len((r["input"] + r["output"]).encode()) for r in kept)
    assert work["extra_bytes"] == held
    assert results["metrics"] == ["exact"] * 3


def test_predictions_give_the_scores_back_without_a_model(whole):
    folder, results = whole
    again = rescore.rescore(records.load(folder), "sound").results
    for name in ("matrix", "single", "op", "bwt", "fwt"):
        assert again[name] == results[name], name


@pytest.fixture
def guard():
    """Sets what becomes of transfers that nobody asked for; it ends with the test."""
    before = jax.config.jax_transfer_guard
    yield functools.partial(jax.config.update, "jax_transfer_guard")
    jax.config.update("jax_transfer_guard", before)


def test_a_step_is_one_call_compiled_once_and_sends_batches_alone(tmp_path, guard):
    """Between steps nothing goes to the device but what is placed there on purpose."""
    cfg = make(data__buckets=(32, 48, 64), parallel__speculate=False)
    job = jobs.prepare(cfg, tmp_path)
    calls = collections.Counter()

    def counted(name):
        step = getattr(job.steps, name)

        def call(*args):
            calls[name] += 1
            return step(*args)

        return call

    def after_step(*args):
        with jax.transfer_guard("allow"):  # a merge may send its few numbers
            return job.method.after_step(*args)

    names = ("train", "probe", "rehearse", "validate")
    counting = dataclasses.replace(
        job,
        steps=job.steps._replace(**{name: counted(name) for name in names}),
        method=job.method._replace(after_step=after_step),
    )
    with checkpoint.open(tmp_path / "checkpoints", 1) as checkpointer:
        place, facts = run.restore(job, {}, checkpointer)
    steps = 2 * 24 // 4  # of a task

    def save(place):
        guard("disallow" if 0 < place.step < steps else "allow")

    with logs.bar(1, 0, False) as bar:
        for number in range(3):
            place = run.train_task(
                counting,
                number,
                place,
                facts["seconds"],
                bar,
                lambda group, step, values: None,
                save,
            )
    assert calls["train"] == 3 * steps and calls["probe"] == 0
    merges = rows(tmp_path, "merges.jsonl")
    assert calls["rehearse"] == len(merges) > 0
    for name in names:
        assert getattr(job.steps, name)._cache_size() == (name != "probe"), name


def test_a_loss_that_is_not_finite_stops_with_step_rows_and_adapter(
    tmp_path, monkeypatch
):
    real = jobs.lesson

    def poisoned(job, number):
        if number == 1:
            broken = jax.tree.map(lambda x: x * np.nan, job.base.params)
            job.base.params.update(broken)
        return real(job, number)

    monkeypatch.setattr(jobs, "lesson", poisoned)
    with pytest.raises(aim_jax.InputError) as error:
        run.run(make(), tmp_path / "run")
    text = str(error.value)
    assert f"task {TASKS[1]}, step 1: loss" in text
    assert f"{TASKS[1]}-train-" in text and f"00-{TASKS[0]}" in text


def test_a_workdir_of_another_config_is_refused_and_left_alone(whole):
    folder, _ = whole
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(aim_jax.InputError, match="train.seed: 42, not 7"):
        run.run(make(train__seed=7), folder)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(aim_jax.InputError, match="not empty and holds no run"):
        run.run(make(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture
def unfinished(whole, tmp_path):
    """A copy of the run that has yet to write its results."""
    folder = tmp_path / "unfinished" / "run"
    shutil.copytree(whole[0], folder)
    (folder / "results.json").unlink()
    return folder


def test_data_that_changed_since_the_run_began_is_named(unfinished, monkeypatch):
    real = synthetic.task

    def changed(name, *args):
        splits = real(name, *args)
        if name == TASKS[1]:
            splits["dev"][3]["output"] += "s"
        return splits

    monkeypatch.setattr(synthetic, "task", changed)
    with pytest.raises(aim_jax.InputError) as error:
        run.run(make(eval__fwt=True), unfinished)
    assert str(error.value).startswith(
        f"the dev rows of task '{TASKS[1]}': changed since {unfinished} was begun"
    )


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_base_that_changed_since_the_run_began_is_named(
    unfinished, tmp_path, monkeypatch, name
):
    assets = tmp_path / "assets"
    shutil.copytree(hf.ASSETS, assets)
    data = bytearray((assets / name).read_bytes())
    # White space keeps a JSON file what it was.
    where = data.index(b": ") + 1 if name.endswith("json") else len(data) // 2 + 1
    data[where] = ord("\n") if name.endswith("json") else data[where] ^ 1
    (assets / name).write_bytes(data)
    monkeypatch.setattr(hf, "ASSETS", assets)
    with pytest.raises(
        aim_jax.InputError, match="^model.path 'embedded': changed since"
    ):
        run.run(make(eval__fwt=True), unfinished)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(unfinished):
    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(aim_jax.InputError, match="was begun, but .* no checkpoint"):
        run.run(make(eval__fwt=True), unfinished)
    assert rows(unfinished, logs.METRICS)


def test_held_out_rows_that_changed_are_named(tmp_path):
    file = tmp_path / "held/test/mine.json"
    file.parent.mkdir(parents=True)
    made = synthetic.task(TASKS[0], 1, *SIZES)["test"]
    cfg = make(eval__before_after=(str(tmp_path / "held"),))
    found = []
    for rows in (made[:2], made[:3]):
        file.write_text(json.dumps(rows))
        found.append(jobs.fingerprints(jobs.prepare(cfg, tmp_path / "run")))
    first, second = found
    changed = [name for name in first if first[name] != second[name]]
    assert changed == ["the rows of held-out task 'mine'"]


def test_scores_of_single_tasks_are_those_of_their_rows(tmp_path, monkeypatch):
    made = iter([1.0, 0.0, 0.5])

    def learn_alone(job, task, inputs, seconds):
        score = next(made)
        row = {"input": "i", "label": "l", "prediction": "p", "score": score}
        return [{"id": "0"} | row]

    monkeypatch.setattr(run, "learn_alone", learn_alone)
    job = jobs.prepare(make(), tmp_path / "first")

    def score(job):
        return run.single_score(job, 0, {}, {})

    assert score(job) == score(dataclasses.replace(job, folder=tmp_path / "b")) == 1
    task = job.stream[0]
    for changed in (
        task._replace(train=task.train[1:]),
        task._replace(metric="rouge_l"),
    ):
        other = dataclasses.replace(job, stream=[changed, *job.stream[1:]])
        assert score(other) < 1


def test_a_process_that_writes_nothing_looks_for_nothing(tmp_path, monkeypatch):
    """What the first one writes, a network disk may show the others late."""
    monkeypatch.setattr(logs, "leads", False)
    made = [{"id": "0", "score": 0.5}]
    assert run.kept(tmp_path / "a.jsonl", lambda: made) == made
    monkeypatch.setattr(run, "learn_alone", lambda *args: made)
    job = jobs.prepare(make(), tmp_path / "run")
    assert run.single_score(job, 0, {}, {}) == 0.5
    assert not any(tmp_path.iterdir())


def test_processes_that_were_not_given_the_same(tmp_path, monkeypatch):
    def differing(told):
        seen.append(list(told))
        return [name for name in told if "'sentiment'" in name]

    seen = []
    monkeypatch.setattr(parallel, "differing", differing)
    message = "train rows of task 'sentiment', .* not the same in all processes"
    with pytest.raises(aim_jax.InputError, match=message):
        run.run(make(), tmp_path / "run")
    assert {"config train", "config parallel", "jax"} <= set(seen[0])
    assert "model.path 'embedded'" in seen[1]
    assert not (tmp_path / "run").exists()


def test_single_tasks_begin_when_all_is_saved(tmp_path, monkeypatch):
    seen = []
    for function in (checkpoint.save, checkpoint.wait):
        name = function.__name__

        def spy(*args, name=name, function=function):
            seen.append(name)
            return function(*args)

        monkeypatch.setattr(checkpoint, name, spy)
    monkeypatch.setattr(
        run, "evaluate_task", lambda job, number, *_: [0.5] * (number + 1)
    )
    monkeypatch.setattr(run, "single_score", lambda *_: seen.append("single") or 0.5)
    run.run(make(eval__fwt=True, train__epochs=0), tmp_path / "run")
    told = " ".join(seen)
    assert told.count("wait single save") == len(TASKS) == told.count("single")


def test_labels_that_no_answer_is_long_enough_for(tmp_path):
    job = jobs.prepare(make(), tmp_path / "run")
    task = job.stream[0]
    long = {"id": "x", "input": "i", "output": "word " * 30}
    changed = task._replace(test=[long, *task.test, long])
    usual = config.Eval().max_length
    assert usual == config.Data().max_target  # to which training cuts labels
    very = task._replace(test=[long | {"output": "word " * usual}])
    default = dataclasses.replace(job.cfg, eval=config.Eval())
    assert jobs.too_long(dataclasses.replace(job, cfg=default), very) == 1
    assert jobs.too_long(job, task) == 0
    assert jobs.too_long(job, changed) == 2
    assert jobs.too_long(job, changed._replace(metric="rouge_l")) == 0


@pytest.mark.parametrize(("day", "silent"), [(6, True), (7, False)])
def test_what_a_task_goes_without_is_told(tmp_path, capsys, day, silent):
    method = step_ebbinghaus.Options(calibration=day, rehearsal=1)
    cfg = make(
        method,
        data__tasks=TASKS[:2],
        data__limit_test=1,
        data__max_input=16,
        train__epochs=1,
    )
    run.run(cfg, tmp_path / "run")
    # Never of the first task, before which there is nothing to rehearse.
    text = f"{TASKS[1]}: method step_ebbinghaus came to no rehearsal in its 6 steps; "
    out = capsys.readouterr().out
    cut = "24 of 24 train inputs reach data.max_input=16 tokens; longer ones lose"
    assert f"{TASKS[0]}: {cut}" in out
    told = [line for line in out.split("\n") if "rehears" in line]
    assert len(told) == (0 if silent else 1)
    assert all(line.startswith(text) for line in told)


def test_a_model_that_writes_nothing_for_the_memory_is_told(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run.synthesis, "write", lambda *given, **named: [])
    cfg = make(
        data__tasks=TASKS[:2],
        data__limit_test=1,
        memory__source="model",
        train__epochs=1,
    )
    run.run(cfg, tmp_path / "run")
    told = [line for line in capsys.readouterr().out.split("\n") if "memory" in line]
    text = f"{TASKS[0]}: the model wrote no row that can be used; the memory has none"
    assert [line.startswith(text) for line in told] == [True]


def test_what_the_model_reads_to_write_a_memory_is_not_cut(tmp_path, monkeypatch):
    lengths, long = [], "many words " * 50

    def decoded(job, decoder, delta, examples, key=None):
        lengths.append(max(len(e.inputs) for e in examples))
        return [np.zeros(0, np.int32)] * len(examples)

    def write(name, shown, cfg, key, gaps, sample, fits, embed, answer):
        assert fits([long, "a few words"]) == [False, True]
        assert sample([long]) == [""]
        return []

    monkeypatch.setattr(run, "decoded", decoded)
    monkeypatch.setattr(run.synthesis, "write", write)
    cfg = make(
        data__tasks=TASKS[:2],
        data__limit_test=1,
        data__max_input=32,
        data__max_test_input=16,
        memory__source="model",
        train__epochs=1,
    )
    run.run(cfg, tmp_path / "run")
    tested, shown, both = lengths
    assert tested == both == 16 and shown > 100


def test_a_run_may_have_the_name_of_what_runs_share(tmp_path):
    for name in ("other", "single", ".single"):
        (tmp_path / ".single").mkdir(exist_ok=True)
        (tmp_path / ".single" / "a.jsonl").touch()
        if name == ".single":
            with pytest.raises(aim_jax.InputError, match="holds no run"):
                run.claim(make(eval__fwt=True), tmp_path / name)
        else:
            run.claim(make(eval__fwt=True), tmp_path / name)


def test_without_validation_rows_the_last_adapter_is_kept(tmp_path):
    ends = [
        run.run(make(data__tasks=TASKS[:1], **changes), tmp_path / str(i))
        for i, changes in enumerate(
            ({"train__validation_rows": 0}, {"train__select": "last"})
        )
    ]
    assert ends[0]["matrix"] == ends[1]["matrix"]
    ours, theirs = (adapter(tmp_path / str(i), 0) for i in range(2))
    assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)


def test_two_processes_do_not_share_a_run(unfinished):
    with logs.alone(unfinished):
        with pytest.raises(aim_jax.InputError, match="another process is at work"):
            run.run(make(eval__fwt=True), unfinished)


def test_a_run_that_begins_at_the_same_time_leaves_the_other_its_config(tmp_path):
    cfg = make(data__tasks=TASKS[:1])

    def other(cfg):
        loaded = jobs.load_model(cfg)  # meanwhile the folder becomes another's
        if begins:
            logs.write(tmp_path / "run" / "config.json", theirs)
        return loaded

    theirs = json.dumps(config.to_json(make(train__seed=7)), indent=1)
    for begins in (False, True):
        held = contextlib.nullcontext() if begins else logs.alone(tmp_path / "run")
        words = "train.seed: 7" if begins else "another process is at work"
        with held, pytest.raises(aim_jax.InputError, match=words):
            run.run(cfg, tmp_path / "run", other)
        files = [p.name for p in (tmp_path / "run").iterdir()]
        assert files == ["config.json"] * begins
    assert (tmp_path / "run" / "config.json").read_text() == theirs


def test_a_folder_that_cannot_be_written_to_is_named_at_once(tmp_path, monkeypatch):
    # Root may write anywhere but on what is mounted so.
    monkeypatch.setattr(run.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(aim_jax.InputError, match=f"'{tmp_path}' cannot be written to"):
        run.run(make(), tmp_path / "a" / "run")
    assert not list(tmp_path.iterdir())
    # Scores of single tasks lie beside the run.
    (tmp_path / "run").mkdir()
    run.claim(make(), tmp_path / "run")
    with pytest.raises(aim_jax.InputError, match=f"'{tmp_path}' cannot be written to"):
        run.claim(make(eval__fwt=True), tmp_path / "run")


def test_a_finished_run_may_lie_where_nothing_can_be_written(whole, monkeypatch):
    monkeypatch.setattr(run.os, "access", lambda path, mode: False)
    assert run.run(make(eval__fwt=True), whole[0]) == whole[1]


def test_a_run_killed_while_it_wrote_its_config_begins_anew(tmp_path):
    (tmp_path / "config.json.123.part").write_text("{")
    run.claim(make(), tmp_path)


def test_a_finished_run_without_its_report_writes_it(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    (folder / "report.html").unlink()
    run.run(make(eval__fwt=True), folder)
    assert (folder / "report.html").read_text().endswith("</html>\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("write", [logs.append, logs.write_rows])
def test_a_file_that_cannot_be_written_is_named(tmp_path, write):
    file = tmp_path / logs.METRICS
    file.symlink_to("/dev/full")
    if write is logs.write_rows:
        (tmp_path / f"{logs.METRICS}.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(
        aim_jax.InputError, match=f"{file}: cannot be written: No space"
    ):
        write(file, {"a": 1} if write is logs.append else [{"a": 1}])


@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_broken_file_of_a_run_is_named(whole, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    for text, what in (('{"cut', "not JSON"), ("[]", "must be a JSON object")):
        (folder / name).write_text(text)
        with pytest.raises(aim_jax.InputError, match=f"{name}: {what}"):
            run.run(make(eval__fwt=True), folder)
        assert (folder / name).read_text() == text


def test_rows_that_a_resumed_run_writes_again_are_cut(whole, tmp_path):
    """So is a line that a crash cut short; any other that is no row is named."""
    text = (whole[0] / logs.METRICS).read_text()
    file = tmp_path / logs.METRICS
    file.write_text(text + '{"task": 2, "st')
    logs.cut(tmp_path, 2, 12)
    assert file.read_text() == text
    logs.cut(tmp_path, 1, 7)
    kept = [r for r in rows(whole[0], logs.METRICS) if (r["task"], r["step"]) <= (1, 7)]
    assert rows(tmp_path, logs.METRICS) == kept
    for line, what in (
        ("3", "must be a JSON object"),
        ('{"task": 1}', "field 'step' is missing"),
        ('{"task": "1", "step": 2}', "field 'task' must be a whole number"),
        ('{"task": 1, "st', "not JSON"),
    ):
        file.write_text(f"{line}\n{text}")
        with pytest.raises(aim_jax.InputError, match=f"{logs.METRICS}:1: {what}"):
            logs.cut(tmp_path, 2, 12)
        assert file.read_text() == f"{line}\n{text}"


def test_missing_model_or_data_leave_no_workdir(tmp_path):
    for cfg, culprit in (
        (make(model__path=str(tmp_path / "nothing")), "model.path"),
        (make(data__benchmark="superni", data__root=str(tmp_path / "no")), "data.root"),
    ):
        with pytest.raises(aim_jax.InputError, match=culprit):
            run.run(cfg, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_seconds_count_what_came_before_a_stop(tmp_path, monkeypatch):
    """A clock that counts steps; the second single-task run is stopped."""
    cfg = make(data__tasks=TASKS[:2], eval__fwt=True, checkpoint__steps=1)
    real, stops, clock = run._read, [3 * 12 + 5], [0]

    def read(*args):
        if clock[0] in stops:
            stops.clear()
            raise KeyboardInterrupt
        clock[0] += 1
        return real(*args)

    monkeypatch.setattr(run, "_read", read)
    fake = types.SimpleNamespace(perf_counter=lambda: float(clock[0]))
    monkeypatch.setattr(run, "time", fake)
    with pytest.raises(KeyboardInterrupt):
        run.run(cfg, tmp_path / "run")
    seconds = run.run(cfg, tmp_path / "run")["seconds"]
    assert seconds == {"train": 24, "evaluate": 0, "single": 24, "total": 48}


def test_held_out_predictions_are_made_once(tmp_path, monkeypatch):
    held = tmp_path / "held" / "test"
    held.mkdir(parents=True)
    made = synthetic.task(TASKS[0], 1, *SIZES)["test"]
    (held / "mine.json").write_text(json.dumps(made))
    job = jobs.prepare(make(eval__before_after=(str(held.parent),)), tmp_path / "run")
    seconds = {"evaluate": 0.0}
    scores = run.held_out_scores(job, "before", jobs.fresh(job), seconds)
    assert list(scores) == ["mine"] and seconds["evaluate"] > 0
    monkeypatch.setattr(run, "predict", lambda *args: pytest.fail("scored again"))
    assert run.held_out_scores(job, "before", None, seconds) == scores


def test_tensorboard_without_its_package_is_refused_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(aim_jax.InputError, match="pip install tensorboardX"):
        run.run(make(logs__tensorboard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_does_not_hang_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    code = f"""
import pathlib, resource
from aim_jax import logs
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
with logs.board(pathlib.Path({str(tmp_path / "board")!r}), True) as board:
    for step in range(4000):
        board(0, "metrics", step, {{"loss": 1.0}})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert "InputError" in done.stderr and "board: cannot be written" in done.stderr
