"""The task stream: data, train, signals, merge, evaluate, checkpoint.

`train_task` is the method at work: dispatch a step, read the signals of the one before,
let the method decide, go on from the state it gives back.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
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
    jobs,
    logs,
    methods,
    metrics,
    parallel,
    preemption,
    records,
    report,
    steps,
)
from aim_jax.data import batches, memory, synthesis, tasks
from aim_jax.models import hf

Tree = Any
CHUNK = 8  # rehearsal steps in one compiled call; any number takes ceil(n / 8) calls
PATIENCE = 60  # seconds; for so long NFS may not show what another machine has written


class Place(NamedTuple):
    """Where training stands after `step` steps of a task; best: delta and its loss."""

    step: int
    state: steps.State
    memo: methods.Memo
    best: Tree
    best_loss: float


def run(
    cfg: config.Config,
    folder: pathlib.Path,
    load: Callable[[config.Config], jobs.Loaded] = jobs.load_model,
) -> dict[str, Any]:
    """Train the stream of `cfg` and write everything into `folder`; returns the results.

    A run that was stopped goes on from its last checkpoint, and ends as if it had never
    stopped; a finished one returns its results. Raises InputError for input that cannot
    be used, before anything that is already in `folder` is touched, and Preempted after
    SIGTERM (where `preemption.watch` was called). load: `jobs.load_model`, or what remembers it.
    """
    done = claim(cfg, folder)
    parallel.meet(f"{folder} is claimed")  # before one writes there
    check_shared(folder, bool(done))
    if done:
        print(f"{folder}: this run is finished")
        if not (folder / "report.html").is_file():
            write_report(folder)
        return done
    sections = {f"config {name}": x for name, x in config.to_json(cfg).items()}
    check_given(sections | versions() | {"python": None})  # any will do
    began = time.perf_counter()
    job = jobs.prepare(cfg, folder, load)
    for task in (*job.stream, *job.held_out):
        long = jobs.too_long(job, task)
        if long:
            print(
                f"{task.name}: {long} of {len(task.test)} test labels are longer than an"
                f" answer may be (eval.max_length={cfg.eval.max_length}); they score 0"
            )
    inputs = jobs.fingerprints(job)
    check_given(inputs)
    with (
        hold(job),
        checkpoint.open(folder / "checkpoints", cfg.checkpoint.keep) as checkpointer,
    ):
        place, facts = restore(job, inputs, checkpointer)
        matrix, seconds = facts["matrix"], facts["seconds"]
        if writes(job):
            written = job.stream[:-1][: len(matrix)]
            job.memory.extend(tasks.remembered(folder, t.name) for t in written)
        counts = [jobs.total_steps(job, n) for n in range(len(job.stream))]
        passed = sum(counts[: len(matrix)]) + place.step

        def count() -> None:
            nonlocal began
            began, before = time.perf_counter(), began
            seconds["total"] += began - before

        def save(place: Place) -> None:
            count()
            total = (*counts, 0)[len(matrix)]
            # A task that ends and the next one that begins have numbers of their own.
            first = sum(counts[: len(matrix)]) + len(matrix) + len(facts["single"])
            keep(job, checkpointer, place, facts, first, total)

        begin(job, checkpointer, place, save)
        logs.cut(folder, len(matrix), place.step)
        before_after = {
            "before": held_out_scores(job, "before", jobs.fresh(job), seconds)
        }
        with (
            logs.bar(sum(counts), passed, cfg.logs.progress) as bar,
            logs.board(folder / "tensorboard", cfg.logs.tensorboard, passed) as board,
        ):
            for number in range(len(matrix), len(job.stream)):
                # What was written since may have made it longer.
                counts[number] = jobs.total_steps(job, number)
                show = functools.partial(board, sum(counts[:number]))
                place = train_task(job, number, place, seconds, bar, show, save)
                held = extra_bytes(job, number, place)
                job.work["extra_bytes"] = max(job.work["extra_bytes"], held)
                scores = [None] * (number + 1)
                if jobs.train_rows(job, number):
                    scores = evaluate_task(job, number, place, seconds)
                    learnt = (task.name for task in job.stream[: number + 1])
                    named = dict(zip(learnt, scores, strict=True))
                    show("score", counts[number], named)
                if writes(job) and number + 1 < len(job.stream):
                    kept = synthesise(job, number, place, seconds)
                    job.memory.append(kept)
                    if not kept:
                        bar.write(
                            f"{job.stream[number].name}: the model wrote no row that can"
                            " be used; the memory has none of this task"
                        )
                matrix.append(scores)
                save(place)
                write_results(job, facts, None)
                bar.write(f"after {jobs.numbered(job, number)}: {_listed(job, scores)}")
        last = adapter(job, place, len(counts) - 1)
        before_after["after"] = held_out_scores(job, "after", last, seconds)
        facts["before_after"] = before_after if job.held_out else None
        single = None
        # Where tasks are not scored when learnt, as by multitask, there is no FWT.
        if cfg.eval.fwt and metrics.fwt(matrix, [0.0] * len(counts)) is not None:
            single = facts["single"]
            for number in range(len(single), len(counts)):
                # It has checkpoints of its own, and of several processes none can finish
                # two of them at once: Orbax's barriers have the same names.
                checkpoint.wait(checkpointer)
                single.append(single_score(job, number, inputs, seconds))
                save(place)
        count()
        results = write_results(job, facts, single, finished=True)
        write_report(folder)
        if logs.leads:
            shutil.rmtree(folder / "single", ignore_errors=True)
    return results


def write_report(folder: pathlib.Path) -> None:
    """Write the report of the runs in `folder`."""
    if not logs.leads:
        return
    page = folder / "report.html"
    with logs.writing(page):
        report.write([folder], page)


def claim(cfg: config.Config, folder: pathlib.Path) -> dict[str, Any] | None:
    """Make `folder` the run of `cfg`; the results of a finished one, else None.

    Raises InputError if it is another config's, or cannot be written to.
    """
    file = folder / "config.json"
    if file.is_file():
        theirs = config.from_json(records.read_json(file))
        changed = config.differences(theirs, cfg)
        if changed:
            raise aim_jax.InputError(
                f"--workdir {folder} belongs to another config ({'; '.join(changed[:5])});"
                " use another --workdir or the same config"
            )
    elif folder.exists() and (
        # A run that ended while it wrote its config has left a part of that.
        not folder.is_dir() or any(p.suffix != ".part" for p in folder.iterdir())
    ):
        raise aim_jax.InputError(
            f"--workdir {folder} is not empty and holds no run; use a new directory"
        )
    results = records.read_json(folder / "results.json", {})
    if results.get("finished"):
        return results
    written = [folder, alone_folder(folder)] if cfg.eval.fwt else [folder]
    for wanted in written:
        above = (wanted.absolute(), *wanted.absolute().parents)
        there = next(p for p in above if p.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            also = " or eval.fwt=false (its scores lie beside a run)"
            raise aim_jax.InputError(
                f"--workdir {folder}: '{there}' cannot be written to; use another --workdir"
                f"{also if wanted != folder else ''}"
            )
    return None


def check_shared(folder: pathlib.Path, done: bool) -> None:
    """Raise InputError, in every process, unless all of them see the same `folder`.

    done: whether a finished run is there, in which nothing is to be written.
    """
    if jax.process_count() == 1:
        return
    token = folder / "shared.part"
    if not done:
        logs.write(token, str(time.time_ns()))
    parallel.meet(f"{token} is written")
    seen = token.read_text() if not done and appears(token) else ""
    try:
        parallel.check_alike([done, seen])
    except AssertionError:
        raise aim_jax.InputError(
            f"--workdir {folder}: not all processes see what the first one has there; it"
            " must be on a disk that all of them share"
        ) from None
    finally:
        if logs.leads:
            token.unlink(missing_ok=True)


def check_given(told: dict[str, Any]) -> None:
    """Raise InputError, in every process, for what (by name) not all were given alike."""
    found = parallel.differing(told)
    if found:
        raise aim_jax.InputError(
            f"{', '.join(found[:3])}: not the same in all processes; give them the same"
            " code, packages, config, base model and data"
        )


@contextlib.contextmanager
def hold(job: jobs.Job) -> Iterator[None]:
    """Keep other runs out of the folder of `job`, which tells from now on what it is of."""
    with logs.alone(job.folder):
        if logs.leads:
            claim(job.cfg, job.folder)  # Another may have begun there since.
        jobs.write(job)
        yield


def restore(
    job: jobs.Job,
    inputs: dict[str, str],
    checkpointer: checkpoint.Checkpointer,
) -> tuple[Place, dict[str, Any]]:
    """The place and the facts (scores, seconds) of the newest checkpoint.

    Without one they are those of a new run. Raises InputError if the inputs have changed.
    """
    place = beginning(job)
    facts: dict[str, Any] = {
        "inputs": inputs,
        "matrix": [],
        "single": [],
        "seconds": dict.fromkeys(("train", "evaluate", "single", "total"), 0.0),
        "work": job.work,
    }
    saved = checkpoint.latest(checkpointer, pack(place)[0], job.devices.replicated)
    if not saved:
        return place, facts
    arrays, facts = saved[0], facts | saved[1]
    changed = [name for name in inputs if facts["inputs"].get(name) != inputs[name]]
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise aim_jax.InputError(
            f"{', '.join(changed[:3])}{more}: changed since {job.folder} was begun; restore"
            " what was there or use another --workdir"
        )
    job.work.update(facts["work"])
    facts["work"] = job.work
    return unpack(place, arrays, facts), facts


def beginning(job: jobs.Job) -> Place:
    """The place before the first task."""
    delta, method = jobs.fresh(job), job.method
    memo = methods.Memo()
    if method.start:
        memo = method.start(delta, len(job.stream))
    state = steps.init(delta, 0, jax.random.key(0), method)
    return Place(0, state, memo, delta, math.inf)


def begin(
    job: jobs.Job,
    checkpointer: checkpoint.Checkpointer,
    place: Place,
    save: Callable[[Place], None],
) -> None:
    """Save the beginning of a run, so that one which has begun has a checkpoint.

    Raises InputError if this one has begun, and they are gone.
    """
    if checkpointer.latest:
        return
    if (job.folder / logs.METRICS).is_file():
        raise aim_jax.InputError(
            f"{job.folder} was begun, but {checkpointer.directory} holds no checkpoint;"
            " restore them, or begin anew in another --workdir"
        )
    save(place)
    checkpoint.wait(checkpointer)


def keep(
    job: jobs.Job,
    checkpointer: checkpoint.Checkpointer,
    place: Place,
    facts: dict[str, Any],
    first: int,
    total: int,
) -> None:
    """Save `place` if it is time to, or if the machine is wanted back: then stop.

    first, total: number of the checkpoint at step 0 of the task, and its steps.
    """
    cfg, step = job.cfg.checkpoint, place.step
    stop = preemption.noticed()
    due = step in (0, total) or step % cfg.steps == 0
    # To agree on the time, processes wait for each other: not at every step.
    if jax.process_count() == 1 or step % job.cfg.train.eval_every == 0:
        due |= parallel.agreed(checkpoint.age(checkpointer) > 60 * cfg.minutes)
    if stop or due:
        arrays, more = pack(place)
        # Of what a method made, each of several processes has a copy of its own.
        arrays = parallel.replicate(arrays, job.devices)
        checkpoint.save(checkpointer, first + step, arrays, facts | more)
    if stop:
        checkpoint.wait(checkpointer)
        raise preemption.Preempted


def pack(place: Place) -> tuple[Tree, dict[str, Any]]:
    """What of a place is arrays, and what is JSON."""
    arrays = {"state": place.state, "memo": place.memo.arrays, "best": place.best}
    host = place.memo.host
    return arrays, {
        "step": place.step,
        "host": None if host is None else dataclasses.asdict(host),
        "best_loss": place.best_loss if math.isfinite(place.best_loss) else None,
    }


def unpack(like: Place, arrays: Tree, facts: dict[str, Any]) -> Place:
    """The place that `pack` took apart; like: another one of its method."""
    best_loss = math.inf if facts["best_loss"] is None else facts["best_loss"]
    memo = methods.Memo(arrays["memo"], methods.revive(like.memo.host, facts["host"]))
    return Place(facts["step"], arrays["state"], memo, arrays["best"], best_loss)


def train_task(
    job: jobs.Job,
    number: int,
    place: Place,
    seconds: dict[str, float],
    bar: tqdm.tqdm,
    show: logs.Board,
    save: Callable[[Place], None],
) -> Place:
    """The place after task `number`, which is step 0 of the next; the adapter is saved.

    place: where to begin, in the task or before it; show: `logs.board` from this task on.
    """
    began = time.perf_counter()
    before = seconds["train"]
    task = jobs.lesson(job, number)
    bar.set_description(f"task {number + 1}/{len(job.stream)} {task.name}")
    limit = job.cfg.data.max_input
    cut = sum(len(example.inputs) == limit for example in task.train)
    if cut:
        bar.write(
            f"{task.name}: {cut} of {len(task.train)} train inputs reach data.max_input="
            f"{limit} tokens; longer ones lose their end"
        )

    def log(file: str, row: dict[str, Any]) -> None:
        logs.append(job.folder / file, {"task": number, "name": task.name, **row})
        shown = {k: v for k, v in row.items() if k != "step"}
        show(pathlib.Path(file).stem, row["step"], shown)
        if "loss" in row:
            names = ("loss", "history", "interval")
            logs.show(bar, {name: row.get(name) for name in names})

    def timed(place: Place) -> None:
        seconds["train"] = before + time.perf_counter() - began
        save(place)

    work, whole = collections.Counter(job.work), place.step == 0
    place = train(job, task, place, log, timed)
    if not task.train:
        return place
    work = job.work - work
    rehearses = job.method.after_step and task.memory and work["steps"] and whole
    if rehearses and not work["rehearsal_steps"]:
        bar.write(
            f"{task.name}: method {job.cfg.method.name} came to no rehearsal in its"
            f" {work['steps']} steps; the memory had no part in this task"
        )
    folder = job.folder / "adapters" / jobs.numbered(job, number)
    made = adapter(job, place, number)
    if logs.leads:
        with logs.writing(folder):
            hf.save_adapter(
                folder, made, job.base.keys, job.cfg.lora, job.cfg.model.path
            )
    seconds["train"] = before + time.perf_counter() - began
    return place


def adapter(job: jobs.Job, place: Place, number: int) -> Tree:
    """What task `number` is evaluated with, and exported, after the task at `place`."""
    if job.method.adapter:
        return job.method.adapter(place.state.delta, place.memo, number)
    return composed(job, place.state.delta, place.memo)


def composed(job: jobs.Job, delta: Tree, memo: methods.Memo) -> Tree:
    """The adapter that the model runs with in training."""
    compose = job.method.compose
    return compose(delta, memo.arrays) if compose else delta


def train(
    job: jobs.Job,
    task: jobs.Lesson,
    place: Place,
    log: Callable[[str, dict[str, Any]], None],
    save: Callable[[Place], None],
) -> Place:
    """Train one task: the loop that every method shares. Returns step 0 of the next.

    The step after this one is on its way before the signals of this one are read. If the
    method answers them with another state, that step is dropped and sent again, so the
    trajectory is that of the plain loop. Raises InputError when a loss is not finite.
    """
    cfg, method = job.cfg, job.method
    first, state, memo, best, best_loss = place
    total = batches.total_steps(len(task.train), cfg.train)
    probing = bool(method.probe and task.memory)
    # A step without a probe has an empty one, so that there is one program to compile.
    blank = jobs.memory_batch(job, task, [])[0] if method.probe else None
    tools = _tools(job, task)
    if first == 0:
        key = jax.random.fold_in(jax.random.key(task.key[0]), task.key[1])
        state = steps.init(state.delta, total, key, method)
        if method.before_task:
            state, memo = method.before_task(tools, state, memo)
        best, best_loss = state.delta, math.inf
    placed = parallel.replicate((state, memo.arrays), job.devices)
    state, memo = placed[0], memo._replace(arrays=placed[1])
    validation = [
        parallel.place(batch, job.devices)
        for batch in batches.validation_batches(
            job.text, task.validation, cfg.eval.batch_size, cfg.train.average
        )
    ]

    def dispatch(state: steps.State, memo: methods.Memo, step: int) -> tuple:
        batch, rows = jobs.train_batch(job, task, step)
        work = {"steps": 1, "train_tokens": batches.tokens(rows)}
        chunk, probed = blank, probing and step % method.probe == 0
        if probed:
            chunk, recalled = jobs.memory_batch(job, task, [(step, 0)])
            work |= {"probes": 1, "probe_tokens": batches.tokens(recalled[0])}
        given = job.base.params, state, memo.arrays, batch, chunk
        after, measures = job.steps.train(*given)
        if not probed:
            measures.pop("history", None)
        return after, measures, [e.id for e in rows], work

    ahead = dispatch(state, memo, first + 1) if first < total else None
    for step in range(first + 1, total + 1):
        state, measures, ids, work = ahead
        going_on = step < total
        if going_on and cfg.parallel.speculate:
            ahead = dispatch(state, memo, step + 1)
        signals = _read(step, total, measures)
        told = {
            name: getattr(signals, name) for name in ("loss", "grad_norm", "history")
        }
        _check_finite(job, task, step, told, ids)
        job.work.update(work)
        record, trained, arrays = None, state, memo.arrays
        if method.after_step:
            state, memo, record = method.after_step(tools, state, memo, signals)
        status = method.status(memo) if method.status and probing else {}
        log(logs.METRICS, {**signals._asdict(), "merged": bool(record), **status})
        if record:
            parallel.check_alike(record)
            log(logs.MERGES, {"step": step, **record})
        moved = state is not trained or memo.arrays is not arrays
        if going_on and (moved or not cfg.parallel.speculate):
            ahead = dispatch(state, memo, step + 1)
        if validation and step % cfg.train.eval_every == 0:
            running = composed(job, state.delta, memo)
            loss = _validation_loss(job, running, validation)
            log(logs.METRICS, {"step": step, "validation": loss})
            if loss < best_loss:
                best, best_loss = state.delta, loss
        save(Place(step, state, memo, best, best_loss))
    if cfg.train.select == "best" and math.isfinite(best_loss):
        state = state._replace(delta=best)
    if method.after_task:
        state, memo = method.after_task(tools, state, memo)
    return Place(0, state, memo, state.delta, math.inf)


def evaluate_task(
    job: jobs.Job, number: int, place: Place, seconds: dict[str, float]
) -> list[float]:
    """Scores on tasks 0..`number`, with the predictions written to disk."""
    began = time.perf_counter()
    folder = job.folder / "predictions" / jobs.numbered(job, number)
    seen, scores = job.stream[: number + 1], []
    if job.method.adapter:
        made = [
            predict(job, adapter(job, place, earlier), [task])[0]
            for earlier, task in enumerate(seen)
        ]
    else:
        made = predict(job, adapter(job, place, number), seen)
    for task, rows in zip(seen, made, strict=True):
        logs.write_rows(folder / f"{task.name}.jsonl", rows)
        scores.append(metrics.mean([r["score"] for r in rows]))
    seconds["evaluate"] += time.perf_counter() - began
    return scores


def predict(
    job: jobs.Job, delta: Tree, several: Sequence[tasks.Task]
) -> list[list[dict[str, Any]]]:
    """A row of text, label, prediction and score for every test row of each task.

    The rows of all tasks are decoded together.
    """
    rows = [row for task in several for row in task.test]
    examples = batches.encode(job.text, rows, truncate=False)
    tokens = decoded(job, job.decode, delta, examples)
    texts = iter(evaluate.texts(job.text.tokenizer, tokens))
    return [
        [
            {
                "id": row["id"],
                "input": row["input"],
                "label": row["output"],
                "prediction": text,
                "score": metrics.score_row(
                    task.metric, text, row["output"], task.remap
                ),
            }
            for row, text in zip(task.test, texts, strict=False)
        ]
        for task in several
    ]


def decoded(
    job: jobs.Job,
    decoder: evaluate.Decoder,
    delta: Tree,
    examples: list[batches.Example],
    key: jax.Array | None = None,
) -> list[np.ndarray]:
    """Token ids that the model gives for each example."""
    rows = job.cfg.eval.batch_size
    return evaluate.generate(
        decoder, job.base.params, delta, job.text, examples, rows, job.devices, key
    )


def writes(job: jobs.Job) -> bool:
    """Whether the model writes the rows of the memory."""
    cfg = job.cfg.memory
    return job.method.memory and cfg.source == "model" and not cfg.replay


def synthesise(
    job: jobs.Job, number: int, place: Place, seconds: dict[str, float]
) -> list[batches.Row]:
    """The rows that the model writes after task `number` for the memory; they are saved."""
    began = time.perf_counter()
    cfg, task = job.cfg, job.stream[number]
    key = jobs.key(cfg, task)
    base_alone = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), place.state.delta)
    seed = jax.random.fold_in(jax.random.key(key[0]), key[1])
    keys = (jax.random.fold_in(seed, call) for call in itertools.count())
    # A prompt that is cut shows no rows, and what is cut is no measure of what fits.
    data = dataclasses.replace(job.text.data, max_test_input=1 << 30)
    whole = job.text._replace(data=data)

    def encoded(inputs: Sequence[str]) -> list[batches.Example]:
        rows = [{"id": "", "input": text, "output": ""} for text in inputs]
        return batches.encode(whole, rows, truncate=False)

    def texts(
        decoder: evaluate.Decoder, delta: Tree, inputs: Sequence[str], key: Any = None
    ) -> list[str]:
        examples = encoded(inputs)
        tokens = decoded(job, decoder, delta, examples, key)
        count = sum(
            len(e.inputs) + len(t) for e, t in zip(examples, tokens, strict=True)
        )
        job.work.update(synthesis_tokens=count)
        return evaluate.texts(job.text.tokenizer, tokens)

    def sample(inputs: Sequence[str]) -> list[str]:
        return texts(job.sample, base_alone, inputs, next(keys))

    earlier = [t.train for t in job.stream[: number + 1]]
    vocabulary = job.text.tokenizer.get_vocab()
    rows = synthesis.write(
        task.name,
        memory.sample(earlier, cfg.memory.percent, "exact")[-1],
        cfg.memory,
        key,
        gaps=job.base.family.KIND == "encdec"
        and set(synthesis.GAPS) <= set(vocabulary),
        sample=sample,
        fits=lambda inputs: [
            len(e.inputs) <= cfg.data.max_input for e in encoded(inputs)
        ],
        embed=lambda inputs: evaluate.embed(
            job.base.embedding,
            job.text,
            encoded(inputs),
            cfg.eval.batch_size,
            job.devices,
        ),
        answer=functools.partial(texts, job.decode, adapter(job, place, number)),
    )
    logs.write_rows(job.folder / "memory" / f"{jobs.numbered(job, number)}.jsonl", rows)
    seconds["train"] += time.perf_counter() - began
    return rows


def held_out_scores(
    job: jobs.Job, when: str, delta: Tree, seconds: dict[str, float]
) -> dict[str, float]:
    """Scores on the held-out tasks, `before` or `after` the stream; predictions are kept."""
    began = time.perf_counter()
    folder = job.folder / "predictions" / when
    scores = {}
    for task in job.held_out:
        rows = kept(
            folder / f"{task.name}.jsonl",
            lambda task=task: predict(job, delta, [task])[0],
        )
        scores[task.name] = metrics.mean([row["score"] for row in rows])
    seconds["evaluate"] += time.perf_counter() - began
    return scores


def kept(
    file: pathlib.Path, make: Callable[[], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The predictions in `file`, which are made if the first process does not see it."""
    if not parallel.agreed(file.is_file()):
        rows = make()
        logs.write_rows(file, rows)
        return rows
    appears(file)
    return records.rows(file, records.PREDICTION, finished=True, notes=[])


def appears(file: pathlib.Path) -> bool:
    """Whether `file` is here, or comes while another machine's writing may be late."""
    end = time.monotonic() + PATIENCE
    while not file.is_file() and time.monotonic() < end:
        time.sleep(0.1)
    return file.is_file()


def single_score(
    job: jobs.Job, number: int, inputs: dict[str, str], seconds: dict[str, float]
) -> float:
    """Score of a fresh adapter trained on task `number` alone, for FWT.

    It does not depend on the method, so its predictions are kept beside the run, in
    `.single/`, for every run of the same data, model and training, and copied into it.
    """
    task = job.stream[number]
    data = {
        k: v
        for k, v in config.to_json(job.cfg).items()
        if k in ("model", "data", "train", "lora", "eval")
    }
    for section, field in (
        ("data", "order"),
        ("data", "tasks"),
        ("lora", "path"),
        ("eval", "before_after"),
    ):
        data[section].pop(field)
    key = json.dumps([data, *task, job.base.fingerprint], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    file = alone_folder(job.folder) / f"{task.name}-{digest}.jsonl"
    rows = kept(file, functools.partial(learn_alone, job, task, inputs, seconds))
    own = job.folder / "predictions" / "single" / f"{task.name}.jsonl"
    logs.write_rows(own, rows)
    return metrics.mean([row["score"] for row in rows])


def alone_folder(folder: pathlib.Path) -> pathlib.Path:
    """What the run in `folder` shares with those beside it: scores of single tasks."""
    return folder.absolute().parent / ".single"


def learn_alone(
    job: jobs.Job, task: tasks.Task, inputs: dict[str, str], seconds: dict[str, float]
) -> list[dict[str, Any]]:
    """Predictions of a fresh adapter trained on `task` alone."""
    began = time.perf_counter()
    alone = jobs.alone(job, task)
    work = collections.Counter()
    # With a probe, which stays empty, its steps are in the compilation cache already.
    method = methods.Method(probe=job.method.probe)
    apart = dataclasses.replace(
        job, start=None, steps=job.plain, method=method, work=work
    )
    total = batches.total_steps(len(alone.train), job.cfg.train)
    with checkpoint.open(job.folder / "single" / task.name, 1) as checkpointer:
        place, facts = restore(apart, inputs, checkpointer)
        own, before = facts["seconds"], facts["seconds"]["single"]
        bar = logs.bar(total, place.step, job.cfg.logs.progress)
        bar.set_description(f"single {task.name}")

        def log(file: str, row: dict[str, Any]) -> None:
            if "loss" in row:
                logs.show(bar, {"loss": row["loss"]})

        def save(place: Place) -> None:
            own["single"] = before + time.perf_counter() - began
            keep(apart, checkpointer, place, facts, 0, total)

        with bar:
            place = train(apart, alone, place, log, save)
    (made,) = predict(job, place.state.delta, [task])
    seconds["single"] += before + time.perf_counter() - began
    seconds["total"] += before  # What came since is counted by `run`.
    return made


def write_results(
    job: jobs.Job,
    facts: dict[str, Any],
    single: list[float] | None,
    finished: bool = False,
) -> dict[str, Any]:
    """Write results.json and return its content."""
    matrix = facts["matrix"]
    count = len(job.stream)
    results = {
        "method": job.cfg.method.name,
        "benchmark": job.cfg.data.benchmark,
        "order": None if job.cfg.data.tasks else job.cfg.data.order,
        "tasks": [t.name for t in job.stream],
        "metrics": [t.metric for t in job.stream],
        "rows": job.usage,
        "seed": job.cfg.train.seed,
        "finished": finished,
        "matrix": [[*row, *[None] * (count - len(row))] for row in matrix],
        "op": metrics.op(matrix),
        "bwt": metrics.bwt(matrix),
        "fwt": metrics.fwt(matrix, single) if single else None,
        "single": single,
        "before_after": facts.get("before_after"),
        "versions": versions(),
        "model": job.base.fingerprint,
        "parameters": sum(x.size for x in jax.tree.leaves(job.base.params)),
        "work": dict(job.work),
        "config_sha256": config.sha256(job.cfg),
        "seconds": {k: round(v, 3) for k, v in facts["seconds"].items()},
    }
    logs.write(job.folder / "results.json", json.dumps(results, indent=1))
    return results


def versions() -> dict[str, str]:
    """Versions of what decides a result, and the devices."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {
        "aim_jax": aim_jax.__version__,
        "python": platform.python_version(),
        **found,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def extra_bytes(job: jobs.Job, number: int, place: Place) -> int:
    """Bytes a method keeps after task `number`, beside the adapter and its optimizer.

    Its arrays, and the text of the rows that its memory has by then.
    """
    rows = (row for kept in job.memory[: number + 1] for row in kept)
    text = sum(
        len(row[field].encode()) for row in rows for field in ("input", "output")
    )
    arrays = (place.memo.arrays, place.state.carry)
    return text + sum(x.nbytes for x in jax.tree.leaves(arrays))


def _listed(job: jobs.Job, scores: list[float | None]) -> str:
    named = zip(job.stream, scores, strict=False)
    known = [f"{task.name} {100 * x:.1f}" for task, x in named if x is not None]
    return ", ".join(known) or "not trained"


def _tools(job: jobs.Job, task: jobs.Lesson) -> methods.Tools:
    """What a method may call during `task`."""

    def rehearse(
        state: steps.State, memo: methods.Memo, step: int, count: int
    ) -> tuple[steps.State, list[float]]:
        losses, seen = [], []
        for first in range(1, count + 1, CHUNK):
            size = min(CHUNK, count + 1 - first)
            # A chunk is always full, so that every one has the same shape.
            places = [(step, first + i % size) for i in range(CHUNK)]
            batch, rows = jobs.memory_batch(job, task, places)
            state, values = job.steps.rehearse(
                job.base.params, state, memo.arrays, batch, size
            )
            losses.append((values, size))
            seen += rows[:size]
            tokens = sum(map(batches.tokens, rows[:size]))
            job.work.update(rehearsal_steps=size, rehearsal_tokens=tokens)
        read = [float(v) for values, n in losses for v in values[:n]]
        for loss, chosen in zip(read, seen, strict=True):
            told = {"loss of rehearsal": loss}
            _check_finite(job, task, step, told, [e.id for e in chosen])
        return state, read

    def fisher(state: steps.State, memo: methods.Memo, rows: int | None) -> Tree:
        micro = job.cfg.train.micro
        chosen = memory.draw(len(task.train), rows or len(task.train), task.key)
        total = None
        for first in range(0, len(chosen), micro):
            examples = [task.train[i] for i in chosen[first : first + micro]]
            batch = parallel.place(
                batches.collate(job.text, [examples], micro, share=False),
                job.devices,
            )
            part = job.steps.squares(job.base.params, state, memo.arrays, batch)
            total = part if total is None else jax.tree.map(jax.numpy.add, total, part)
            job.work.update(
                fisher_rows=len(examples), fisher_tokens=batches.tokens(examples)
            )
        return jax.tree.map(lambda x: x / len(chosen), total)

    return methods.Tools(
        number=task.number,
        remembered=len(task.memory),
        rehearse=rehearse,
        fuse=fusion.fuse,
        fresh=functools.partial(jobs.fresh, job),
        fisher=fisher,
    )


def _read(step: int, total: int, measures: Tree) -> methods.Signals:
    """The signals of a step, read from the device."""
    read = {k: float(v) for k, v in jax.device_get(measures).items()}
    return methods.Signals(step=step, total=total, **read)


def _validation_loss(job: jobs.Job, delta: Tree, validation: list[Tree]) -> float:
    parts = [job.steps.validate(job.base.params, delta, batch) for batch in validation]
    return float(np.sum(jax.device_get(parts), dtype=np.float64))


def _check_finite(
    job: jobs.Job,
    task: jobs.Lesson,
    step: int,
    told: dict[str, float | None],
    ids: list[str],
) -> None:
    bad = [name for name, value in told.items() if not math.isfinite(value or 0.0)]
    if bad:
        last = ("none", *records.numbered(job.folder / "adapters").values())[-1]
        raise aim_jax.InputError(
            f"task {task.name}, step {step}: {' and '.join(bad)} not finite on the"
            f" rows {', '.join(ids)}; the last good adapter: {last}. Lower"
            " train.learning_rate or look at these rows"
        )
