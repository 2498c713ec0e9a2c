"""The recorded run of the PyTorch release, run by this package and timed beside it.

`python -m aim_jax.benchmark --against release`. The recording (tests/golden.py) has seconds
of each part, taken on one thread of another machine of this class: hold the ratios of
processor times for rough, those of wall times for rougher.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
from typing import Any

import golden
from test_golden import Kit

import aim_jax
from aim_jax import benchmark, config, jobs, parallel, run

# Clock here -> its mean in the recording.
RECORDED = {"seconds": "wall_mean_s", "processor_seconds": "cpu_mean_s"}


def replay() -> dict[str, Any]:
    """Rows `training`, `evaluation` and `whole run`, beside the release's.

    The main job in the `release` preset, from the recorded first adapter, on the recorded
    batches of each step and probe. Training has steps, probes, rehearsal, merges and
    validation, compiling and files; of the release's, the recorded seconds of a step, a
    probe, ... times how many this run had. Evaluation likewise, by the sample.
    """
    if not golden.FOLDER.is_dir():
        raise aim_jax.InputError(
            f"--against release: no recorded run in {golden.FOLDER}; see AIM_JAX_GOLDEN"
        )
    kit = Kit()
    cfg = free(kit)
    spent = collections.defaultdict(collections.Counter)
    kept = [(place, name, getattr(place, name)) for place, name in PATCHED]
    try:
        feed(kit)
        for part in ("train_task", "evaluate_task", "run"):
            setattr(run, part, clocked(part, spent))
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(sys.stderr),  # stdout is for the figures
        ):
            results = run.run(cfg, pathlib.Path(folder) / "run")
            merges = (pathlib.Path(folder) / "run" / "merges.jsonl").read_text()
    finally:
        for place, name, original in kept:
            setattr(place, name, original)
    made = [json.loads(line) for line in merges.splitlines()]
    rows = released(cfg, made, len(results["tasks"]))
    parts = {"training": "train_task", "evaluation": "evaluate_task"}
    found = {}
    for name, part in (*parts.items(), ("whole run", "run")):
        ours = spent[part]
        theirs = rows[name]
        found[name] = dict(ours) | {
            "against": {
                "release": {
                    **theirs,
                    "ratio": ours["seconds"] / theirs["seconds"],
                    "processor_ratio": ours["processor_seconds"]
                    / theirs["processor_seconds"],
                }
            }
        }
    found["work"] = results["work"] | {"merges": len(made)}
    return found


PATCHED = (
    *((jobs, name) for name in ("fresh", "train_batch", "memory_batch")),
    *((run, name) for name in ("train_task", "evaluate_task", "run")),
)


def free(kit: Kit) -> config.Config:
    """The recorded job's config for a run of the whole stream."""
    return dataclasses.replace(
        kit.cfg,
        data=dataclasses.replace(
            kit.cfg.data, buckets=config.Data().buckets, device_rows=2
        ),
        eval=dataclasses.replace(kit.cfg.eval, fwt=False),
        logs=config.Logs(progress=False),
    )


def feed(kit: Kit) -> None:
    """Let runs begin with the recorded adapter, and read the recorded batches."""
    start = kit.tree(golden.trace(golden.CONTINUAL[0])["lora_start"])
    draw = jobs.memory_batch

    def train_batch(job: jobs.Job, task: jobs.Lesson, step: int) -> tuple:
        data = golden.trace(golden.CONTINUAL[task.number])
        batch = golden.train_batch(job.text, job.cfg, data, step)
        rows = data["mb_rows"][data["mb_step"] == step].ravel()
        return parallel.place(batch, job.devices), golden.examples(data, rows)

    def memory_batch(job: jobs.Job, task: jobs.Lesson, places: list) -> tuple:
        if [number for _, number in places] != [0]:  # rehearsal, which this run decides
            return draw(job, task, places)
        data = golden.trace(golden.CONTINUAL[task.number])
        rows = data["probe_rows"][places[0][0] - 1]
        batch = golden.memory_batch(job.text, job.cfg, data, [rows])
        return parallel.place(batch, job.devices), [golden.examples(data, rows)]

    jobs.fresh = lambda job, number=0: start
    jobs.train_batch, jobs.memory_batch = train_batch, memory_batch


def clocked(name: str, spent: dict[str, collections.Counter]) -> Any:
    """A function of `run` that adds the time of its calls up."""
    call = getattr(run, name)

    @functools.wraps(call)
    def timed(*args: Any) -> Any:
        made, seconds = benchmark.elapsed(lambda: call(*args))
        spent[name].update(seconds)
        return made

    return timed


def released(
    cfg: config.Config, merges: list[dict[str, Any]], tasks: int
) -> dict[str, dict[str, float]]:
    """The release's seconds for the work of a run with these merges, by part and clock."""
    recorded = {
        task["task"]: task
        for task in golden.read("tasks.json")
        if task["mode"] == "ours"
    }
    sample = golden.read("metrics.json")["generation_seconds_per_sample"]
    rows = sum(
        len(golden.read(f"data/test/{t}_T5.json.gz")) * (tasks - i)
        for i, t in enumerate(cfg.data.tasks)
    )
    found: dict[str, dict[str, float]] = {"training": {}, "evaluation": {}}
    for clock, mean in RECORDED.items():
        total = 0.0
        for number in range(tasks):
            task = recorded[number]
            rehearsed = sum(m["rehearsal"] for m in merges if m["task"] == number)
            counts = {
                "forward_backward_micro": task["microbatches"],
                "optimizer_step": task["steps"],
                "probe": task["steps"],
                "evaluation": len(task["eval"]),
                "outer_forward_backward": rehearsed,
                "outer_optimizer": rehearsed,
            }
            times = task["time"]
            total += sum(n * times[k][mean] for k, n in counts.items() if times[k])
        found["training"][clock] = total
        found["evaluation"][clock] = rows * sample[mean.split("_")[0]]
    parts = list(found.values())
    found["whole run"] = {k: sum(part[k] for part in parts) for k in RECORDED}
    return found
