"""The task stream: data, train, signals, merge, evaluate, checkpoint.

`train_task` is the method at work: dispatch a step, read the signals of the one before,
let the method decide, go on from the state it gives back.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

import aim_jax
from aim_jax import (
    checkpoint,
    config,
    evaluate,
    fusion,
    logs,
    lora,
    methods,
    metrics,
    parallel,
    report,
    steps,
)
from aim_jax.data import batches, memory, tasks
from aim_jax.models import hf

Tree = Any
CHUNK = 8  # rehearsal steps in one compiled call; any number takes ceil(n / 8) calls


class Job(NamedTuple):
    """All that stays the same while a run goes on."""

    cfg: config.Config
    folder: pathlib.Path
    stream: list[tasks.Task]
    base: hf.Base
    text: batches.Text
    devices: parallel.Devices
    steps: steps.Steps
    decode: Callable
    method: methods.Method


class Lesson(NamedTuple):
    """One task as examples: what to train on, what to validate on, what to rehearse.

    key: integers that decide every random choice of the task.
    """

    name: str
    train: list[batches.Example]
    validation: list[batches.Example]
    memory: list[batches.Example]
    key: tuple[int, int]


def run(cfg: config.Config, folder: pathlib.Path) -> dict[str, Any]:
    """Train the stream of `cfg` and write everything into `folder`; returns the results.

    A run that was stopped goes on after its last finished task; a finished one returns
    its results. Raises InputError for input that cannot be used, before anything that
    is already in `folder` is touched.
    """
    claim(cfg, folder)
    done = finished(folder)
    if done:
        print(f"{folder}: this run is finished; its results are:")
        return done
    began = time.perf_counter()
    job = prepare(cfg, folder)
    delta = fresh(job)
    memo = job.method.start(delta) if job.method.start else methods.Memo()
    progress: dict[str, Any] = {
        "fingerprint": job.base.fingerprint,
        "matrix": [],
        "seconds": dict.fromkeys(("train", "evaluate", "single", "total"), 0.0),
    }
    saved = checkpoint.load(folder / "checkpoints", delta, memo, job.devices.replicated)
    if saved:
        delta, memo, progress = saved
        if progress["fingerprint"] != job.base.fingerprint:
            raise aim_jax.InputError(
                f"model.path: '{cfg.model.path}' has changed since {folder} was begun;"
                " restore it or use another --workdir"
            )
    seconds = progress["seconds"]
    before = seconds["total"]
    logs.cut(folder, len(progress["matrix"]))
    with logs.bar(*_lengths(job, progress), "", cfg.logs.progress) as bar:
        for number in range(len(progress["matrix"]), len(job.stream)):
            delta, memo = train_task(job, number, delta, memo, seconds, bar)
            scores = evaluate_task(job, number, delta, seconds)
            progress["matrix"].append(scores)
            seconds["total"] = before + time.perf_counter() - began
            name = _numbered(job, number)
            hf.save_adapter(
                folder / "adapters" / name,
                delta,
                job.base.keys,
                cfg.lora,
                cfg.model.path,
            )
            checkpoint.save(folder / "checkpoints", number + 1, delta, memo, progress)
            write_results(job, progress, None)
            shown = ", ".join(
                f"{t.name} {100 * s:.1f}"
                for t, s in zip(job.stream, scores, strict=False)
            )
            bar.write(f"after {name}: {shown}")
    single = None
    if cfg.eval.fwt:
        single = [
            single_score(job, number, seconds) for number in range(len(job.stream))
        ]
    seconds["total"] = before + time.perf_counter() - began
    results = write_results(job, progress, single, finished=True)
    report.write([folder], folder / "report.html")
    return results


def claim(cfg: config.Config, folder: pathlib.Path) -> None:
    """Make `folder` the run of `cfg`. Raises InputError if it is another config's."""
    file = folder / "config.json"
    if file.is_file():
        theirs = config.from_json(json.loads(file.read_text()))
        changed = config.differences(theirs, cfg)
        if changed:
            raise aim_jax.InputError(
                f"--workdir {folder} belongs to another config ({'; '.join(changed[:5])});"
                " use another --workdir or the same config"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise aim_jax.InputError(
            f"--workdir {folder} is not empty and holds no run; use a new directory"
        )


def finished(folder: pathlib.Path) -> dict[str, Any] | None:
    """The results of a finished run, else None."""
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    return results if results.get("finished") else None


def prepare(cfg: config.Config, folder: pathlib.Path) -> Job:
    """Load data, base model and tokenizer and compile lazily; then write config.json."""
    stream = tasks.load(cfg.data)
    if not cfg.train.validation_leaks:
        stream = tasks.without_leaks(stream, cfg.train.validation_rows)
    devices = parallel.open_devices(cfg.parallel.mode)
    base = hf.load(cfg.model, devices.replicated)
    text = batches.Text(
        batches.tokenizer(hf.directory(cfg.model.path)),
        base.family.KIND,
        cfg.data,
        devices.count,
    )
    lora.targets(base.keys, cfg.lora)
    probe_dropout = bool(getattr(cfg.method, "probe_dropout", False))
    pure = steps.make(base.model, cfg, probe_dropout)
    compiled = steps.Steps(
        train=parallel.compile(pure.train, devices, batch=3, args=4),
        probe=parallel.compile(pure.probe, devices, batch=2, args=3),
        rehearse=parallel.compile(pure.rehearse, devices, batch=2, args=4),
        validate=parallel.compile(pure.validate, devices, batch=2, args=3),
    )
    decode = evaluate.greedy(base.model, text.tokenizer.eos_token_id, cfg)
    method = methods.module(cfg.method.name).make(cfg.method)
    logs.write(folder / "config.json", json.dumps(config.to_json(cfg), indent=1))
    return Job(cfg, folder, stream, base, text, devices, compiled, decode, method)


def fresh(job: Job) -> Tree:
    """A new adapter, the same for the stream and for every single-task run."""
    key = jax.random.key(job.cfg.train.seed)
    delta = lora.init(key, job.base.params, job.base.keys, job.cfg.lora)
    return jax.device_put(delta, job.devices.replicated)


def lesson(job: Job, number: int) -> Lesson:
    """Task `number` of the stream with what the earlier tasks leave it."""
    cfg, task = job.cfg, job.stream[number]
    held = tasks.validation(job.stream[: number + 1], cfg.train.validation_rows)
    kept: list[batches.Row] = []
    if job.method.memory and number:
        earlier = [t.train for t in job.stream[:number]]
        kept = memory.fill(earlier, cfg.memory.percent, cfg.memory.rule)
    return Lesson(
        task.name,
        *(batches.encode(job.text, rows) for rows in (task.train, held, kept)),
        key=_key(cfg, task),
    )


def train_task(
    job: Job,
    number: int,
    delta: Tree,
    memo: methods.Memo,
    seconds: dict[str, float],
    bar: tqdm.tqdm,
) -> tuple[Tree, methods.Memo]:
    """The adapter and memo after task `number`, trained from `delta`."""
    began = time.perf_counter()
    task = lesson(job, number)
    bar.set_description(f"task {number + 1}/{len(job.stream)} {task.name}")

    def log(signals: methods.Signals | None, **more: Any) -> None:
        row = {"task": number, "name": task.name, **more}
        if signals is None:
            file = logs.METRICS if "validation" in more else logs.MERGES
            logs.append(job.folder / file, row)
            return
        logs.append(job.folder / logs.METRICS, {**row, **signals._asdict()})
        shown = {"loss": f"{signals.loss:.3f}"}
        if signals.history is not None:
            shown["history"] = f"{signals.history:.3f}"
        if more.get("interval"):
            shown["interval"] = more["interval"]
        bar.set_postfix(shown, refresh=False)
        bar.update()

    delta, memo = train(job, job.method, task, delta, memo, log)
    seconds["train"] += time.perf_counter() - began
    return delta, memo


def train(
    job: Job,
    method: methods.Method,
    task: Lesson,
    delta: Tree,
    memo: methods.Memo,
    log: Callable,
) -> tuple[Tree, methods.Memo]:
    """Train one task: the loop that every method shares.

    The step after this one is on its way before the signals of this one are read. If the
    method answers them with another state, that step is dropped and sent again, so the
    trajectory is that of the plain loop. Raises InputError when a loss is not finite.
    """
    cfg = job.cfg
    total = batches.total_steps(len(task.train), cfg.train)
    state = steps.init(
        delta, total, jax.random.fold_in(jax.random.key(task.key[0]), task.key[1])
    )
    state = jax.device_put(state, job.devices.replicated)
    probing = method.probe and bool(task.memory)
    tools = _tools(job, task)
    if method.before_task:
        state, memo = method.before_task(tools, state, memo)
    validation = [
        parallel.place(batch, job.devices)
        for batch in batches.validation_batches(
            job.text, task.validation, cfg.eval.batch_size, cfg.train.average
        )
    ]
    best, best_loss = None, math.inf

    def dispatch(state: steps.State, memo: methods.Memo, step: int) -> tuple:
        batch, ids = _train_batch(job, task, step)
        after, measures = job.steps.train(job.base.params, state, memo.arrays, batch)
        history = None
        if probing:
            history = job.steps.probe(
                job.base.params, after, _memory_batch(job, task, [(step, 0)])
            )
        return after, measures, history, ids

    ahead = dispatch(state, memo, 1)
    for step in range(1, total + 1):
        state, measures, history, ids = ahead
        going_on = step < total
        if going_on and cfg.parallel.speculate:
            ahead = dispatch(state, memo, step + 1)
        signals = _read(step, total, measures, history)
        _check_finite(job, task, signals, ids)
        record = None
        trained, arrays = state, memo.arrays
        if method.after_step:
            state, memo, record = method.after_step(tools, state, memo, signals)
        log(
            signals,
            merged=bool(record),
            **(method.status(memo) if method.status and probing else {}),
        )
        if record:
            log(None, step=step, **record)
        moved = state is not trained or memo.arrays is not arrays
        if going_on and (moved or not cfg.parallel.speculate):
            ahead = dispatch(state, memo, step + 1)
        if step % cfg.train.eval_every == 0 and validation:
            parts = [
                job.steps.validate(job.base.params, state.delta, batch)
                for batch in validation
            ]
            loss = float(sum(np.float64(part) for part in parts))
            log(None, step=step, validation=loss)
            if loss < best_loss:
                best, best_loss = state.delta, loss
    if best is not None and cfg.train.select == "best":
        state = state._replace(delta=best)
    if method.after_task:
        state, memo = method.after_task(tools, state, memo)
    return state.delta, memo


def evaluate_task(
    job: Job, number: int, delta: Tree, seconds: dict[str, float]
) -> list[float]:
    """Scores on tasks 0..`number`, with the predictions written to disk."""
    began = time.perf_counter()
    folder = job.folder / "predictions" / _numbered(job, number)
    scores = []
    for task in job.stream[: number + 1]:
        rows = predict(job, delta, task)
        logs.write_rows(folder / f"{task.name}.jsonl", rows)
        scores.append(sum(r["score"] for r in rows) / len(rows))
    seconds["evaluate"] += time.perf_counter() - began
    return scores


def predict(job: Job, delta: Tree, task: tasks.Task) -> list[dict[str, Any]]:
    """A row of text, label, prediction and score for every test row of a task."""
    examples = batches.encode(job.text, task.test, truncate=False)
    tokens = evaluate.generate(
        job.decode,
        job.base.params,
        delta,
        job.text,
        examples,
        job.cfg.eval.batch_size,
        job.devices,
    )
    return [
        {
            "id": row["id"],
            "input": row["input"],
            "label": row["output"],
            "prediction": text,
            "score": metrics.score_row(task.metric, text, row["output"], task.remap),
        }
        for row, text in zip(
            task.test, evaluate.texts(job.text.tokenizer, tokens), strict=True
        )
    ]


def single_score(job: Job, number: int, seconds: dict[str, float]) -> float:
    """Score of a fresh adapter trained on task `number` alone, for FWT.

    It does not depend on the method, so it is kept beside the run, in `single/`, for
    every run of the same data, model and training.
    """
    task = job.stream[number]
    data = {
        k: v
        for k, v in config.to_json(job.cfg).items()
        if k in ("model", "data", "train", "lora", "eval")
    }
    for field in ("order", "tasks"):
        data["data"].pop(field)
    key = json.dumps([data, task.name, job.base.fingerprint], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    file = job.folder.parent / "single" / f"{task.name}-{digest}.json"
    if file.is_file():
        return json.loads(file.read_text())["score"]
    began = time.perf_counter()
    cfg = job.cfg.train
    rows, held = task.train, tasks.validation([task], cfg.validation_rows)
    if cfg.single_holdout:
        rows, held = tasks.holdout(task.train, cfg.single_holdout)
    examples, validation = (batches.encode(job.text, r) for r in (rows, held))
    alone = Lesson(task.name, examples, validation, [], _key(job.cfg, task))
    total = batches.total_steps(len(examples), cfg)
    with logs.bar(total, 0, f"single {task.name}", job.cfg.logs.progress) as bar:

        def log(signals: methods.Signals | None, **more: Any) -> None:
            bar.update(signals is not None)

        delta, _ = train(job, methods.Method(), alone, fresh(job), methods.Memo(), log)
    made = predict(job, delta, task)
    score = sum(r["score"] for r in made) / len(made)
    seconds["single"] += time.perf_counter() - began
    logs.write(file, json.dumps({"task": task.name, "score": score}))
    return score


def write_results(
    job: Job,
    progress: dict[str, Any],
    single: list[float] | None,
    finished: bool = False,
) -> dict[str, Any]:
    """Write results.json and return its content."""
    matrix = progress["matrix"]
    count = len(job.stream)
    results = {
        "method": job.cfg.method.name,
        "benchmark": job.cfg.data.benchmark,
        "order": job.cfg.data.order,
        "tasks": [t.name for t in job.stream],
        "seed": job.cfg.train.seed,
        "finished": finished,
        "matrix": [[*row, *[None] * (count - len(row))] for row in matrix],
        "op": metrics.op(matrix),
        "bwt": metrics.bwt(matrix),
        "fwt": metrics.fwt(matrix, single) if single else None,
        "single": single,
        "versions": _versions(),
        "model": job.base.fingerprint,
        "config_sha256": config.sha256(job.cfg),
        "seconds": {k: round(v, 3) for k, v in progress["seconds"].items()},
    }
    logs.write(job.folder / "results.json", json.dumps(results, indent=1))
    return results


def _versions() -> dict[str, str]:
    names = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {
        "aim_jax": aim_jax.__version__,
        "python": platform.python_version(),
        **found,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _key(cfg: config.Config, task: tasks.Task) -> tuple[int, int]:
    # By name, so that a task's random choices do not depend on its place in the stream.
    return cfg.train.seed, zlib.crc32(task.name.encode())


def _numbered(job: Job, number: int) -> str:
    return f"{number:02d}-{job.stream[number].name}"


def _lengths(job: Job, progress: dict[str, Any]) -> tuple[int, int]:
    """Steps of the whole stream, and those already done."""
    counts = [batches.total_steps(len(t.train), job.cfg.train) for t in job.stream]
    return sum(counts), sum(counts[: len(progress["matrix"])])


def _train_batch(job: Job, task: Lesson, step: int) -> tuple[Tree, list[str]]:
    """The batch of a step on its devices, and the ids of its rows."""
    cfg = job.cfg.train
    chosen = [
        [task.train[i] for i in rows]
        for rows in batches.step_rows(len(task.train), cfg, task.key, step)
    ]
    rows = cfg.micro_batch_size or cfg.batch_size
    batch = batches.collate(job.text, chosen, rows, cfg.average)
    return parallel.place(batch, job.devices), [e.id for m in chosen for e in m]


def _memory_batch(job: Job, task: Lesson, places: Sequence[tuple[int, int]]) -> Tree:
    """Memory batches for (step, number) pairs: number 0 probes, others rehearse."""
    cfg = job.cfg
    chosen = [
        [
            task.memory[i]
            for i in memory.draw(
                len(task.memory), cfg.memory.batch_size, (*task.key, step, number)
            )
        ]
        for step, number in places
    ]
    batch = batches.collate(job.text, chosen, cfg.memory.batch_size)
    if getattr(cfg.method, "loss_scale", None) == "accumulation":
        micro = cfg.train.micro_batch_size or cfg.train.batch_size
        batch["weights"] /= cfg.train.batch_size // micro
    return parallel.place(batch, job.devices)


def _tools(job: Job, task: Lesson) -> methods.Tools:
    """What a method may call during `task`."""

    def rehearse(
        state: steps.State, step: int, count: int
    ) -> tuple[steps.State, list[float]]:
        losses = []
        for first in range(1, count + 1, CHUNK):
            size = min(CHUNK, count + 1 - first)
            # A chunk is always full, so that every one has the same shape.
            places = [(step, first + i % size) for i in range(CHUNK)]
            state, values = job.steps.rehearse(
                job.base.params, state, _memory_batch(job, task, places), size
            )
            losses.append((values, size))
        return state, [float(v) for values, n in losses for v in values[:n]]

    return methods.Tools(rehearse, fusion.fuse)


def _read(step: int, total: int, measures: Tree, history: Any) -> methods.Signals:
    """The signals of a step, read from the device."""
    measures, history = jax.device_get((measures, history))
    return methods.Signals(
        step=step,
        total=total,
        **{k: float(v) for k, v in measures.items()},
        history=None if history is None else float(history),
    )


def _check_finite(
    job: Job, task: Lesson, signals: methods.Signals, ids: list[str]
) -> None:
    bad = [
        name
        for name in ("loss", "grad_norm", "history")
        if not math.isfinite(getattr(signals, name) or 0.0)
    ]
    if bad:
        names = [x.name for x in sorted((job.folder / "adapters").glob("*"))]
        last = os.fspath(job.folder / "adapters" / names[-1]) if names else "none"
        raise aim_jax.InputError(
            f"task {task.name}, step {signals.step}: {' and '.join(bad)} not finite on the"
            f" rows {', '.join(ids)}; the last good adapter: {last}. Lower"
            " train.learning_rate or look at these rows"
        )
