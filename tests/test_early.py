"""What threads compile is waited for, used, and not compiled again."""

import collections
import os
import re
import threading

import jax
import jax.numpy as jnp
import pytest
import test_run

from aim_jax import early, run


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


@pytest.fixture
def compiled(caplog):
    """(name, shapes) of programs that XLA was asked for -> the threads that asked."""
    jax.config.update("jax_log_compiles", True)  # on every thread
    yield lambda: _compiled(caplog.records)
    jax.config.update("jax_log_compiles", False)


def _compiled(records):
    found = collections.defaultdict(list)
    for record in records:
        match = re.match(r"Compiling jit\((\w+)\)(.*)", record.getMessage(), re.DOTALL)
        if match:
            found[match.groups()].append(record.threadName)
    return found


def test_a_run_compiles_each_program_once_and_the_later_ones_on_threads(
    cores, compiled, tmp_path
):
    cfg = test_run.make(data__buckets=(24, 40, 64), eval__batch_size=4)
    run.run(cfg, tmp_path / "run")
    names = ("train", "rehearse", "validate", "fill", "run")
    found = {k: v for k, v in compiled().items() if k[0] in names}
    assert all(len(threads) == 1 for threads in found.values()), found
    here = threading.current_thread().name
    elsewhere = collections.Counter(k[0] for k, (t,) in found.items() if t != here)
    assert elsewhere["rehearse"] == elsewhere["validate"] == 1
    # The first length may be needed at once.
    lengths = sum(name == "fill" for name, _ in found)
    assert elsewhere["fill"] >= lengths - 1 > 0 and elsewhere["run"] > 0


def test_a_call_waits_and_raises_what_compiling_raised(cores):
    begin = threading.Event()

    class Lowered:
        def __init__(self, size):
            self.size = size

        def compile(self):
            begin.wait(60)
            if self.size > 1:
                raise MemoryError("no room")

    def function(x):
        assert begin.is_set()
        return x

    function.lower = lambda x: Lowered(x.size)
    program = early.Program(function)
    with early.threads():
        for size in (1, 2):
            early.compile(program, jnp.zeros(size))
        threading.Timer(0.2, begin.set).start()
        assert program(jnp.zeros(1)).shape == (1,)
        with pytest.raises(MemoryError, match="no room"):
            program(jnp.zeros(2))
        assert program(jnp.zeros(3)).shape == (3,)  # which nobody compiled


def test_what_was_not_begun_before_the_end_is_compiled_by_its_call(cores):
    begin = threading.Event()
    slow, program = early.Program(lambda: None), early.Program(jax.jit(jnp.sin))
    slow.function.lower = lambda: begin.wait(60)
    with early.threads():
        early.compile(slow)
        early.compile(program, jnp.zeros(3))
        threading.Timer(0.2, begin.set).start()
    assert program.begun and all(f.cancelled() for f in program.begun.values())
    assert program(jnp.zeros(3)).shape == (3,)
    assert not early.working()


def test_without_a_core_to_spare_or_with_other_processes_there_are_no_threads(
    monkeypatch,
):
    for cores, processes, works in (({0}, 1, 0), ({0, 1}, 2, 0), ({0, 1}, 1, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, c=cores: c)
        monkeypatch.setattr(jax, "process_count", lambda p=processes: p)
        with early.threads():
            assert early.working() == works
