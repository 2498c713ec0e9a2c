"""How fast it is: `python -m aim_jax.benchmark --config configs/X.py [--set a.b=v ...]`.

Prints, as JSON, how long the device waits for the host between steps, with and without
the next step being sent before the signals of the last one are read
(`parallel.speculate`). Rounds alternate between the ways; figures are medians.
With `--measure padding` it counts the tokens that training runs over instead.
"""

import collections
import dataclasses
import json
import math
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

import aim_jax
from aim_jax import config, methods, run, steps
from aim_jax.data import batches


def idle(cfg: config.Config, rounds: int) -> dict[str, Any]:
    """Milliseconds a step of the second task, and the share the device is idle.

    `device` sends all train steps and probes without reading anything, from batches
    that lie ready; what a loop needs beyond that, the device waits for.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = run.prepare(cfg, pathlib.Path(folder))
    task = run.lesson(job, 1)
    delta = run.fresh(job)
    state = steps.init(delta, 0, jax.random.key(0))
    start = run.Place(0, state, methods.Memo(), delta, math.inf)
    # It probes and never merges, so that all ways do the same work.
    watcher = methods.Method(memory=True, probe=True)
    total = batches.total_steps(len(task.train), cfg.train)
    ready = [
        (run.train_batch(job, task, s)[0], run.memory_batch(job, task, [(s, 0)])[0])
        for s in range(1, total + 1)
    ]

    def loop(speculate: bool) -> Any:
        parallel = dataclasses.replace(cfg.parallel, speculate=speculate)
        train = dataclasses.replace(cfg.train, eval_every=total + 1)
        own = dataclasses.replace(cfg, parallel=parallel, train=train)
        nothing = [lambda *given: None] * 2
        place = run.train(job._replace(cfg=own), watcher, task, start, *nothing)
        return place.state

    def device() -> Any:
        after, histories = steps.init(delta, total, jax.random.key(0)), []
        after = jax.device_put(after, job.devices.replicated)
        for batch, memory in ready:
            after, _ = job.steps.train(job.base.params, after, (), batch)
            histories.append(job.steps.probe(job.base.params, after, (), memory))
        return after, histories

    ways = {
        "device": device,
        "plain": lambda: loop(False),
        "speculative": lambda: loop(True),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            jax.block_until_ready(way())
            if number:  # the first round compiles
                spent[name].append((time.perf_counter() - began) / total)
    seconds = {name: statistics.median(values) for name, values in spent.items()}
    return {
        "milliseconds a step": {k: round(1000 * s, 3) for k, s in seconds.items()},
        "idle": {
            k: round(1 - seconds["device"] / seconds[k], 4)
            for k in ("plain", "speculative")
        },
        "rounds": rounds,
        "steps": total,
        "versions": run.versions(),
    }


def padding(cfg: config.Config) -> dict[str, Any]:
    """Input tokens that the train steps run over for a real one, an epoch of each task.

    `parts`: sorted within a batch and cut to a bucket; `batch`: a whole batch in the
    bucket of its longest row; `micro_batches`: as rows come, each micro-batch as long as
    its longest row. `lengths`: all that a part is cut to.
    """
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, epochs=1))
    with tempfile.TemporaryDirectory() as folder:
        job = run.prepare(cfg, pathlib.Path(folder))
    micro = cfg.train.micro_batch_size or cfg.train.batch_size
    buckets = sorted(cfg.data.buckets)
    ran, real, lengths = collections.Counter(), 0, set()
    for number in range(len(job.stream)):
        task = run.lesson(job, number)
        for step in range(1, batches.total_steps(len(task.train), cfg.train) + 1):
            batch, examples = run.train_batch(job, task, step)
            rows = [batches.longest(job.text, [e]) for e in examples]
            full, least = batch["inputs"].shape[-1], batch["targets"].shape[-1]
            sizes = np.array(batches.cuts(buckets, full, least))
            used = np.asarray(batch["mask"]).sum(-1).max(-1)
            cut = sizes[np.searchsorted(sizes, used)]
            lengths.update(cut.tolist())
            ran["parts"] += batch["inputs"].shape[-2] * int(cut.sum())
            ran["batch"] += len(rows) * batches.bucket(max(rows), buckets)
            for first in range(0, len(rows), micro):
                some = rows[first : first + micro]
                ran["micro_batches"] += len(some) * max(some)
            real += sum(rows)
    return {
        "tokens": {way: round(count / real, 3) for way, count in ran.items()},
        "lengths": sorted(lengths),
        "versions": run.versions(),
    }


def main(argv: list[str]) -> None:
    """Measure and print."""
    with aim_jax.command(argv):
        cfg = config.load(flags.FLAGS.config, flags.FLAGS.set)
        idles = flags.FLAGS.measure == "idle"
        made = idle(cfg, flags.FLAGS.rounds) if idles else padding(cfg)
        print(json.dumps(made, indent=1))


if __name__ == "__main__":
    flags.DEFINE_string("config", "configs/quickstart.py", "Config file.")
    flags.DEFINE_multi_string("set", [], "section.field=value; may be repeated.")
    flags.DEFINE_enum("measure", "idle", ["idle", "padding"], "What to measure.")
    flags.DEFINE_integer("rounds", 5, "Alternating rounds.", lower_bound=1)
    app.run(main)
