"""A run in a process of its own, to be stopped at a moment of one's choosing.

    python tests/crash.py WORKDIR [section.field=value ...]

is the main job on the stream of test_run.py. It says on standard output what it is about
to do (`PHASES`), so that whoever kills it knows where the kill struck.

    python tests/crash.py --kills 100 [--signal SIGKILL] [--seed 0] FOLDER

kills such runs at random moments, compares what they end with to an unbroken run, and
prints how often in each phase and how many seconds a run took at most to end.
"""

import argparse
import collections
import json
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).parents[1]
# What a run may be about to do, and the longest that a kill waits then, in seconds.
PHASES = {
    "load": 8.0,  # the process has started
    "step": 0.2,
    "rehearse": 0.2,  # a chunk of the steps before a merge
    "save": 0.15,  # a checkpoint
    "write": 0.01,  # predictions, results, report
    "evaluate": 0.3,
    "single": 1.0,  # a task by itself, for FWT
}


class Process:
    """A run that says what it is at: `said` counts the phases."""

    def __init__(self, folder: pathlib.Path, *overrides: str):
        self.said: collections.Counter[str] = collections.Counter()
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(folder), *overrides],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def strike(self, phase: str, count: int, delay: float, number: int) -> bool:
        """Send signal `number`, `delay` s after `phase` was said `count` times.

        False if the run ended before that.
        """
        with self._news:
            self._news.wait_for(lambda: self.said[phase] >= count or self.said["end"])
        time.sleep(delay)
        self._process.send_signal(number)
        return not self.said["end"]

    def end(self) -> tuple[int, str]:
        """Exit status and standard error of the process, once it has ended."""
        errors = self._process.stderr.read()
        return self._process.wait(), errors

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._tell(line.strip())
        self._tell("end")

    def _tell(self, what: str) -> None:
        with self._news:
            self.said[what] += 1
            self._news.notify_all()


def outcome(folder: pathlib.Path) -> dict[str, object]:
    """What a run must end with however often it was stopped: file -> content."""
    kept = {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in ("*.jsonl", "adapters/*/*", "memory/*", "predictions/*/*")
        for path in folder.glob(pattern)
    }
    results = json.loads((folder / "results.json").read_text())
    del results["seconds"]
    return kept | {"results.json": results}


def differences(ours: dict[str, object], theirs: dict[str, object]) -> list[str]:
    """Names of what is in one outcome and not, or not the same, in the other."""
    names = sorted(ours.keys() | theirs.keys())
    return [name for name in names if ours.get(name) != theirs.get(name)]


def random_kills(
    folder: pathlib.Path, kills: int, seed: int, how: signal.Signals = signal.SIGKILL
) -> tuple[collections.Counter, float]:
    """Send a signal at random moments until `kills` struck.

    Returns how many in each phase, and the most seconds from a signal to the end. A run
    that ends before its kill is compared with the unbroken one (AssertionError if anything
    differs), and another begins.
    """
    rng, struck, number = random.Random(seed), collections.Counter(), 0
    # While a process loads, SIGTERM ends it as any other.
    phases = [p for p in PHASES if how == signal.SIGKILL or p != "load"]
    longest = 0.0
    assert Process(folder / "whole" / "run").end()[0] == 0
    whole = outcome(folder / "whole" / "run")
    while True:
        place = folder / f"{number:03d}" / "run"
        phase = rng.choice(phases)
        process = Process(place, f"checkpoint.steps={rng.choice((1, 2, 5, 200))}")
        if struck.total() < kills:
            delay = rng.uniform(0, PHASES[phase])
            hit = process.strike(phase, rng.randint(1, 2), delay, how)
            struck[phase] += hit
        else:
            hit = False
        began = time.time()
        code, errors = process.end()
        assert code == (-how if hit and how == signal.SIGKILL else 0), errors
        if hit:
            seconds = time.time() - began
            longest = max(longest, seconds)
            print(f"{number:03d} {phase} ended after {seconds:.1f} s", flush=True)
        if not hit:
            assert not differences(outcome(place), whole), place
            print(
                f"{struck.total()} kills, {number + 1} runs: nothing lost", flush=True
            )
            number += 1
            if struck.total() == kills:
                return struck, longest


def job(folder: pathlib.Path, overrides: list[str]) -> None:
    """The main command on a small stream, saying what it is at."""
    sys.path.insert(0, str(ROOT))
    from absl import app

    from aim_jax import checkpoint, evaluate, jobs, logs, main, run

    def saying(phase, module, name):
        function = getattr(module, name)

        def wrapped(*args, **kwargs):
            print(phase, flush=True)
            return function(*args, **kwargs)

        setattr(module, name, wrapped)

    print("load", flush=True)
    saying("step", jobs, "train_batch")
    saying("save", checkpoint, "save")
    saying("write", logs, "write")
    saying("evaluate", evaluate, "generate")
    saying("single", run, "single_score")
    rehearsal = jobs.memory_batch

    def memory_batch(job, task, places):
        if places and places[0][1]:  # 0 is a probe
            print("rehearse", flush=True)
        return rehearsal(job, task, places)

    jobs.memory_batch = memory_batch
    config = pathlib.Path(__file__).with_name("crash_config.py")
    settings = [f"--set={text}" for text in overrides]
    app.run(main.main, ["", f"--config={config}", f"--workdir={folder}", *settings])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--signal", type=signal.Signals.__getitem__, default="SIGKILL")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.kills is None:
        job(given.folder, given.overrides)
    else:
        began = time.time()
        struck, longest = random_kills(
            given.folder, given.kills, given.seed, given.signal
        )
        for phase, count in struck.items():
            print(f"{phase}: {count}")
        print(f"at most {longest:.1f} s from a signal to the end")
        print(f"{time.time() - began:.0f} s in all")
