"""Two processes on this machine, most with four devices each."""

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
PROCESS = """
import os, pathlib, signal, sys, time
import jax, numpy as np
import aim_jax
from aim_jax import checkpoint, config, logs, main, parallel, preemption

def job(argv):
    main.connect()
    preemption.watch()
    me = jax.process_index()
    try:
        parallel.open_devices(config.Parallel(exact=True))
    except aim_jax.InputError as error:
        assert "needs one process" in str(error)
    else:
        raise AssertionError("not refused")
    assert logs.leads == (me == 0)
    devices = parallel.open_devices(config.Parallel())
    assert (devices.count, devices.mode, devices.whole) == (8, "jit", True)
    # Where the base fits into the devices of the first process alone, all do as it does.
    fits, parallel._fits = parallel._fits, lambda device, size: me == 0
    assert parallel.open_devices(config.Parallel()).whole
    parallel._fits = fits
    # Each process holds its own rows and no other; all are given back.
    rows = np.arange(48).reshape(16, 3)
    batch = parallel.place({"inputs": rows[None]}, devices)["inputs"]
    own = sorted(int(s.data[0, 0, 0]) for s in batch.addressable_shards)
    assert own == [24 * me + 6 * i for i in range(4)], own
    double = jax.jit(lambda base, batch: batch["rows"] * 2)
    found = parallel.by_rows(double, (), {"rows": rows}, devices)
    assert np.array_equal(found, rows * 2)
    total = parallel.compile(lambda x: x.sum(), devices, batch=0, args=1)(batch)
    assert float(total) == rows.sum()
    assert parallel.agreed(me == 0) and not parallel.agreed(me == 1)
    parallel.check_alike({"step": 3})
    try:
        parallel.check_alike({"step": me})
    except AssertionError as error:
        assert "processes have parted" in str(error)
    else:
        raise AssertionError("not noticed")
    assert parallel.differing({"a": 3, "b": {"c": me}, "d": "e"}) == ["b"]
    assert parallel.differing({f"of {me}": 3}) == [f"of {me}"]
    # A checkpoint of both is read by both.
    arrays = {"a": jax.device_put(np.arange(5.0), devices.replicated)}
    folder = pathlib.Path(sys.argv[-1])
    with checkpoint.open(folder, 2) as checkpointer:
        checkpoint.save(checkpointer, 1, arrays, {"who": me})
    with checkpoint.open(folder, 2) as checkpointer:
        loaded, facts = checkpoint.latest(checkpointer, arrays, devices.replicated)
    assert np.array_equal(loaded["a"], np.arange(5.0)) and facts["who"] == 0
    # Where one of them cannot read the newest, both stop, and it stays.
    with checkpoint.open(folder, 2) as checkpointer:
        checkpoint.save(checkpointer, 2, arrays, {})
    with checkpoint.open(folder, 2) as checkpointer:
        if me == 1:
            load = checkpoint._load

            def broken(checkpointer, number, like):
                if number == 2:
                    raise OSError("stale")
                return load(checkpointer, number, like)

            checkpoint._load = broken
        try:
            checkpoint.latest(checkpointer, arrays, devices.replicated)
        except aim_jax.InputError as error:
            assert f"the same newest checkpoint (here {2 - me})" in str(error)
        else:
            raise AssertionError("not noticed")
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
    # Both hear of a signal to one of them, and at the same call, after a checkpoint too.
    for call in range(1000):
        if call == 30:
            with checkpoint.open(folder, 2) as checkpointer:
                checkpoint.save(checkpointer, 3, arrays, {})
            if me == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)  # in which JAX tells both
        if preemption.noticed():
            break
        parallel.meet(str(call))
    else:
        raise AssertionError("not noticed")
    parallel.check_alike(call)

main.app.run(job)
"""
# Without the decoder's own q, whose gradients here are 1e-8: rounding decides their sign,
# and Adam makes a whole step of it.
SETTINGS = (
    r"--set=lora.target=encoder.*\.(q|v)|.*EncDecAttention\.(q|v)|.*\.v",
    f"--config={ROOT / 'tests/crash_config.py'}",
    "--set=data.tasks=entity,sentiment",
    "--set=train.epochs=1",
    "--set=train.learning_rate=3e-4",
    "--set=checkpoint.steps=2",
    "--set=eval.fwt=false",
)


def environment(devices):
    """Of a process that sees so many CPU devices, and this folder's modules."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": path}


def pair(*program, devices=4):
    """Two processes of `program` that know of each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [
                *(sys.executable, *program, f"--coordinator=localhost:{port}"),
                *("--processes=2", f"--process={i}"),
            ],
            cwd=ROOT,
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def test_processes_share_rows_decisions_checkpoints_and_signals(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS.replace("sys.argv[-1]", repr(str(tmp_path / "saved"))))
    for process in pair(script):
        _, errors = process.communicate()
        assert process.returncode == 0, errors


SINGLE = """
import jax, jax.numpy as jnp, numpy as np
from aim_jax import config, main, parallel

def job(argv):
    main.connect()
    devices = parallel.open_devices(config.Parallel())
    tree = {"device": jnp.arange(3), "host": np.arange(3, dtype=np.int32)}
    for _ in range(2):  # from each process's own, then from what is whole already
        tree = parallel.replicate(tree, devices)
        for x in tree.values():
            assert x.sharding == devices.replicated
            assert [s.data.tolist() for s in x.addressable_shards] == [[0, 1, 2]]
            assert int(jax.jit(jnp.sum)(x)) == 3

main.app.run(job)
"""


def test_processes_of_a_single_device_hold_what_is_whole(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(SINGLE)
    for process in pair(script, devices=1):
        _, errors = process.communicate()
        assert process.returncode == 0, errors


APART = """
import os, sys
from aim_jax import main, run

run.PATIENCE = 1
os.chdir(os.path.join(sys.argv.pop(1), sys.argv[-1][-1]))
main.app.run(main.main)
"""


def test_processes_that_do_not_share_the_folder_of_the_run(tmp_path):
    """Each of them ends with the same error, and nothing is left behind."""
    script = tmp_path / "process.py"
    script.write_text(APART)
    (tmp_path / "0").mkdir()
    # Here is what one that was killed has left.
    (tmp_path / "1" / "run").mkdir(parents=True)
    (tmp_path / "1" / "run" / "shared.part").write_text("1")
    began = time.time()
    for process in pair(script, tmp_path, *SETTINGS, "--workdir=run"):
        _, errors = process.communicate()
        assert process.returncode == 2, errors
        (error,) = (e for e in errors.splitlines() if e.startswith("error: "))
        assert error.startswith("error: --workdir run: not all processes see")
        assert error.endswith("it must be on a disk that all of them share")
    assert time.time() - began < 60
    assert not any((tmp_path / "0" / "run").iterdir())


def start(folder):
    """Both processes of the main job, once it has saved something in training."""
    before = {p.name for p in (folder / "checkpoints").glob("*")}
    processes = pair("-m", "aim_jax.main", *SETTINGS, f"--workdir={folder}")
    while {p.name for p in (folder / "checkpoints").glob("[1-9]*")} <= before:
        assert processes[0].poll() is None, processes[0].stderr.read()
        time.sleep(0.1)
    return processes


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_give_the_result_of_one(tmp_path):
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    main = (sys.executable, "-m", "aim_jax.main")
    alone = subprocess.Popen(
        [*main, *SETTINGS, f"--workdir={one}"], cwd=ROOT, env=environment(1)
    )
    first, second = start(two)
    second.kill()
    killed = time.time()
    _, errors = first.communicate()
    assert first.returncode not in (0, None)
    assert time.time() - killed < 60  # of which 30 are the heartbeat's
    # Of this program, unless JAX misses the heartbeat first.
    assert "the same command goes on" in errors or "another task died" in errors
    processes = start(two)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "the same command goes on from here" in errors
    assert not (two / "results.json").exists() or len(rows(two, logs.METRICS)) < 14
    script = ["bash", "launch/local.sh", "--processes", "2", "--devices", "4"]
    done = subprocess.run(
        [*script, *SETTINGS, f"--workdir={two}"],
        cwd=ROOT,
        env=environment(4),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert alone.wait() == 0
    for name in (logs.METRICS, logs.MERGES):
        for a, b in zip(rows(one, name), rows(two, name), strict=True):
            same = ("task", "step", "merged", "interval", "planned", "flag", "weights")
            assert [a.get(k) for k in same] == [b.get(k) for k in same]
            if "loss" in a:  # float32 sums in another order
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    for path in one.glob("adapters/*/*.safetensors"):
        a = safetensors.numpy.load_file(path)
        b = safetensors.numpy.load_file(two / path.relative_to(one))
        assert all(np.allclose(a[k], b[k], rtol=0, atol=1e-6) for k in a | b)
    a, b = (json.loads((f / "results.json").read_text()) for f in (one, two))
    assert a["matrix"] == b["matrix"]
    for path in one.glob("predictions/*/*"):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()
