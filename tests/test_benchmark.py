"""The idle time of the device, measured on a short stream."""

import subprocess
import sys

import jax
import numpy as np
import pytest
import test_run

from aim_jax import benchmark, run


def test_every_way_does_the_same_work_and_is_timed(monkeypatch):
    rounds, ends = 2, {False: [], True: []}
    train = run.train

    def watched(job, method, task, place, log, save):
        after = train(job, method, task, place, log, save)
        ends[job.cfg.parallel.speculate].append(after.state.delta)
        return after

    monkeypatch.setattr(run, "train", watched)
    made = benchmark.idle(test_run.make(train__epochs=1), rounds)

    plain, speculative = ends[False], ends[True]
    assert len(plain) == len(speculative) == rounds + 1  # the first is not timed
    for delta in (*plain[1:], *speculative):
        jax.tree.map(np.testing.assert_array_equal, plain[0], delta)
    assert made["rounds"] == rounds
    assert made["steps"] == 24 / 4
    spent = made["milliseconds a step"]
    assert set(spent) == {"device", "plain", "speculative"}
    assert min(spent.values()) > 0
    for way, idle in made["idle"].items():
        expected = 1 - spent["device"] / spent[way]
        assert idle == pytest.approx(expected, abs=0.01)


def test_padding_is_counted():
    """Two parts of two rows a step: counted here row by row."""
    cfg = test_run.make(data__buckets=(32, 40, 64), data__device_rows=2)
    made = benchmark.padding(cfg)
    assert 1 <= made["tokens"]["parts"] <= made["tokens"]["batch"]
    assert 1 <= made["tokens"]["micro_batches"] <= made["tokens"]["batch"]
    assert set(made["lengths"]) <= {32, 40, 64}
    # One bucket for all: whatever the parts, every row is as long as it.
    whole = benchmark.padding(test_run.make(data__buckets=(64,)))["tokens"]
    assert whole["parts"] == whole["batch"] > made["tokens"]["parts"]


def test_bad_input_is_one_line():
    command = [sys.executable, "-m", "aim_jax.benchmark", "--set=train.epocs=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --set train.epocs=3: no train field 'epocs'")
    assert done.stderr.count("\n") == 1
