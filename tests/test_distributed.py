"""The main job in two processes of four devices each, on this machine."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from aim_jax import logs

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "tests/crash_config.py")
pytestmark = pytest.mark.slow


def command(folder, *flags):
    settings = ("--set=eval.fwt=false", "--set=checkpoint.steps=3")
    return [f"--config={CONFIG}", f"--workdir={folder}", *settings, *flags]


def environment(devices):
    """Of a process that sees so many CPU devices, and this folder's modules."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": path}


def pair(folder):
    """Both processes of a run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "aim_jax.main"),
                *command(folder, f"--coordinator=localhost:{port}"),
                *("--processes=2", f"--process={i}"),
            ],
            cwd=ROOT,
            env=environment(4),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def compare(ours, theirs):
    """Whether two runs decided alike and ended alike."""
    for name in (logs.METRICS, logs.MERGES):
        pairs = zip(rows(ours, name), rows(theirs, name), strict=True)
        for a, b in pairs:
            assert (a["task"], a["step"]) == (b["task"], b["step"])
            assert a.get("merged") == b.get("merged")
            if "loss" in a:
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-5)
    for path in theirs.glob("adapters/*/*.safetensors"):
        a, b = (
            safetensors.numpy.load_file(f / path.relative_to(theirs))
            for f in (ours, theirs)
        )
        assert all(np.allclose(a[k], b[k], rtol=1e-3, atol=1e-5) for k in b)
    a, b = (json.loads((f / "results.json").read_text()) for f in (ours, theirs))
    assert a["matrix"] == b["matrix"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run in one process of eight devices."""
    folder = tmp_path_factory.mktemp("one") / "run"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "aim_jax.main"),
            *command(folder, "--set=parallel.mode=jit"),
        ],
        cwd=ROOT,
        env=environment(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_two_processes_give_the_result_of_one(one, tmp_path):
    folder = tmp_path / "run"
    shape = ("--processes", "2", "--devices", "4")
    done = subprocess.run(
        ["bash", "launch/local.sh", *shape, *command(folder)],
        cwd=ROOT,
        env=environment(4),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    compare(folder, one)


def test_when_one_process_dies_the_other_says_so_and_the_run_goes_on(one, tmp_path):
    folder = tmp_path / "run"
    first, second = pair(folder)
    while len(list((folder / "checkpoints").glob("[1-9]*"))) < 2:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.1)
    second.kill()
    _, errors = first.communicate()
    assert first.returncode != 0
    assert "another task died" in errors or "Connection closed by peer" in errors
    for process in pair(folder):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    compare(folder, one)


def test_sigterm_to_one_stops_both_at_the_same_step(one, tmp_path):
    folder = tmp_path / "run"
    processes = pair(folder)
    while len(list((folder / "checkpoints").glob("[1-9]*"))) < 2:
        assert processes[0].poll() is None, processes[0].stderr.read()
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "the same command goes on from here" in errors
    assert len(rows(folder, logs.METRICS)) < len(rows(one, logs.METRICS))
    for process in pair(folder):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    compare(folder, one)
