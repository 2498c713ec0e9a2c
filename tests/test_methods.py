"""The contract that every method keeps, and the rule of each against a formula of its own."""

import collections
import importlib
import json

import numpy as np
import pytest
import safetensors.numpy

from aim_jax import config, logs, methods, run
from aim_jax.data import batches, synthetic

TASKS = synthetic.STREAM[:2]
# Constants that make a method act within four steps.
SMALL = {"aim": {"interval": 2, "rehearsal": 2, "threshold_factor": 1.0}}


def make(name, **options):
    """A config of two tasks of four steps each."""
    kind = importlib.import_module(f"aim_jax.methods.{name}").Options
    cfg = config.Config(
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


class Runs:
    """Runs of one config that share what is compiled."""

    def __init__(self, folder, name, **options):
        self.cfg, self.folder = make(name, **options), folder
        self.job = run.prepare(self.cfg, folder / "unused")

    def job_in(self, cfg, folder):
        logs.write(folder / "config.json", json.dumps(config.to_json(cfg)))
        return self.job._replace(folder=folder, work=collections.Counter())

    def __call__(self, name, monkeypatch):
        monkeypatch.setattr(run, "prepare", self.job_in)
        return run.run(self.cfg, self.folder / name), self.folder / name


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

    real, seen = run._read, []

    def interrupted(step, *args):
        seen.append(step)
        if len(seen) == len(trained):
            raise KeyboardInterrupt
        return real(step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(run, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs("stopped", patch)
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


def test_replay_trains_on_the_task_and_the_memory_together(tmp_path):
    job = run.prepare(make("replay"), tmp_path)
    first, second = (run.lesson(job, n) for n in range(2))
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
        read = [run.train_batch(job, second, 3 * epoch + s)[1] for s in (1, 2, 3)]
        assert sorted(e.id for batch in read for e in batch) == sorted(ids)


def test_multitask_is_one_training_on_the_union(tmp_path, monkeypatch):
    runs = Runs(tmp_path, "multitask")
    results, folder = runs("run", monkeypatch)
    assert results["matrix"][0] == [None, None]
    assert None not in results["matrix"][1]
    assert results["op"] == np.mean(results["matrix"][1])
    assert results["bwt"] is None and results["work"]["steps"] == 8
    assert [r["task"] for r in rows(folder, logs.METRICS) if "loss" in r] == [1] * 8
    assert list(adapters(folder)) == [f"01-{TASKS[1]}"]
    union = {r["id"] for task in runs.job.stream for r in task.train}
    assert {e.id for e in run.lesson(runs.job, 1).train} == union
