"""What a run works with: data, model, compiled steps, and the batches of each step."""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from aim_jax import config, evaluate, logs, lora, methods, metrics, parallel, steps
from aim_jax.data import batches, memory, tasks
from aim_jax.models import hf

Tree = Any


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What runs that differ only in `train.seed` can share.

    steps: with the method's part in them; plain: without, for single-task runs.
    """

    base: hf.Base
    text: batches.Text
    devices: parallel.Devices
    steps: steps.Steps
    plain: steps.Steps
    decode: evaluate.Decoder
    sample: evaluate.Decoder
    method: methods.Method


@dataclasses.dataclass(frozen=True)
class Job(Loaded):
    """All that stays the same while a run goes on.

    held_out: tasks that are scored before and after the stream.
    start: the adapter `lora.path`, None for a new one.
    memory: rows kept of each task of the stream, none for a method without memory; of
    those that the model writes, as far as the run has come.
    usage: `tasks.usage` by task.
    work: what training on the stream took so far: `steps`, `rehearsal_steps`, `probes`,
    `fisher_rows` and the tokens of each (`train_tokens`, ...), padding not counted;
    `synthesis_tokens`, read and written for the memory; and `extra_bytes`.
    """

    cfg: config.Config
    folder: pathlib.Path
    stream: list[tasks.Task]
    held_out: list[tasks.Task]
    start: Tree | None
    memory: list[list[batches.Row]]
    usage: dict[str, dict[str, int]]
    work: collections.Counter[str]


class Lesson(NamedTuple):
    """One task as examples: what to train on, what to validate on, what to rehearse.

    number: of the task in the stream; key: integers that decide every random choice.
    target: tokens of the longest target, so that all batches have one width.
    """

    name: str
    number: int
    train: list[batches.Example]
    validation: list[batches.Example]
    memory: list[batches.Example]
    key: tuple[int, int]
    target: int = 0


def partial(**fields: Any) -> Job:
    """A job of these fields alone, the others None: for what needs no more of one."""
    blank = dict.fromkeys(field.name for field in dataclasses.fields(Job))
    return Job(**blank | fields)


def open_devices(cfg: config.Config) -> parallel.Devices:
    """The devices of a run of `cfg`."""
    return parallel.open_devices(cfg.parallel, functools.partial(hf.size, cfg.model))


def load_model(cfg: config.Config) -> Loaded:
    """Base and tokenizer, and the functions over them, compiled lazily."""
    devices = open_devices(cfg)
    family, model = hf.build(cfg.model, devices)
    lora.targets(family.keys(model.config), cfg.lora)
    folder = hf.directory(cfg.model.path)
    tokenizer = batches.tokenizer(folder)
    base = hf.load(cfg.model, devices)  # after what can be refused without weights
    method = methods.module(cfg.method.name).make(cfg.method)
    compiled = plain = compile_steps(base, cfg, devices, method)
    if method.compose or method.penalty or method.gradients:
        plain = compile_steps(base, cfg, devices, methods.Method())
    ends = hf.ends(folder, tokenizer.eos_token_id)
    return Loaded(
        base=base,
        text=batches.Text(
            tokenizer,
            base.family.KIND,
            devices.sized(cfg.data),
            count=devices.count,
            vocabulary=base.embedding.shape[0],
        ),
        devices=devices,
        steps=compiled,
        plain=plain,
        decode=evaluate.greedy(base.model, ends, cfg, devices),
        sample=evaluate.sampled(base.model, base.family.KIND, ends, cfg, devices),
        method=method,
    )


def compile_steps(
    base: hf.Base,
    cfg: config.Config,
    devices: parallel.Devices,
    method: methods.Method,
) -> steps.Steps:
    """The steps of a method for these devices, each compiled when it is first called."""
    pure = steps.make(base.model, cfg, method)
    probe = parallel.compile(pure.probe, devices, batch=3, args=4)
    if devices.mode == "exact":
        alone = parallel.compile(pure.train, devices, batch=3, args=4)

        def train(
            base: Tree, state: steps.State, memo: Tree, batch: Tree, chunk: Tree | None
        ) -> tuple[steps.State, dict[str, jax.Array]]:
            # A program of this mode takes one batch.
            state, measures = alone(base, state, memo, batch)
            if chunk is not None:
                measures["history"] = probe(base, state, memo, chunk)
            return state, measures
    else:
        train = parallel.compile(pure.train, devices, batch=3, args=5, split=2)
    return steps.Steps(
        train=train,
        probe=probe,
        rehearse=parallel.compile(pure.rehearse, devices, batch=3, args=5),
        validate=parallel.compile(pure.validate, devices, batch=2, args=3),
        squares=parallel.compile(pure.squares, devices, batch=3, args=4),
    )


def prepare(
    cfg: config.Config,
    folder: pathlib.Path,
    load: Callable[[config.Config], Loaded] = load_model,
) -> Job:
    """Load the data, and by `load` all that no seed changes."""
    found = stream = tasks.load(cfg.data)
    if not cfg.train.validation_leaks:
        rows = cfg.train.validation_rows
        stream = [tasks.without_leaks(task, rows) for task in found]
    pairs = zip(found, stream, strict=True)
    usage = {used.name: tasks.usage(task, used) for task, used in pairs}
    held = tasks.held_out(cfg.eval.before_after, cfg.data.limit_test)
    if cfg.logs.tensorboard:
        logs.tensorboard()
    for metric in {task.metric for task in [*stream, *held]}:
        # Shows a missing package now and not after hours of training.
        metrics.score_row(metric, "", "")
    method, start = methods.module(cfg.method.name).make(cfg.method), None
    kept = remember(cfg.memory, stream) if method.memory else []
    if cfg.lora.path is not None:
        start = hf.start(cfg.lora, cfg.model)
    loaded = load(config.override(cfg, "train.seed=0"))
    start = parallel.replicate(start, loaded.devices)
    text = loaded.text
    encoded = (batches.encode(text, task.train) for task in stream)
    text = text._replace(longest=max(batches.longest(text, e) for e in encoded))
    return Job(
        cfg=cfg,
        folder=folder,
        stream=stream,
        held_out=held,
        start=start,
        memory=kept,
        usage=usage,
        work=collections.Counter(),
        **vars(dataclasses.replace(loaded, text=text)),
    )


def write(job: Job) -> None:
    """Write config.json, and the rows that the memory has from the start."""
    text = json.dumps(config.to_json(job.cfg), indent=1)
    logs.write(job.folder / "config.json", text)
    for number, rows in enumerate(job.memory):
        file = job.folder / "memory" / f"{numbered(job, number)}.jsonl"
        logs.write_rows(file, rows)


def numbered(job: Job, number: int) -> str:
    """How files and messages call task `number`."""
    return f"{number:02d}-{job.stream[number].name}"


def remember(cfg: config.Memory, stream: list[tasks.Task]) -> list[list[batches.Row]]:
    """The rows that the memory keeps of each task: its rule's, or another run's.

    None yet of those that are to be written (`synthesise`).
    """
    if cfg.replay:
        # The last task is rehearsed by none.
        return [tasks.remembered(cfg.replay, task.name) for task in stream[:-1]]
    if cfg.source == "model":
        return []
    return memory.sample([task.train for task in stream[:-1]], cfg.percent, cfg.rule)


def fresh(job: Job, number: int = 0) -> Tree:
    """The adapter before any training: that of `lora.path`, or the new one of number 0.

    Another number gives another new one. Every single-task run begins with a new one.
    """
    if job.start is not None and not number:
        return job.start
    key = jax.random.key(job.cfg.train.seed)
    if number:
        key = jax.random.fold_in(key, number)
    delta = lora.init(key, job.base.params, job.base.keys, job.cfg.lora)
    return parallel.replicate(delta, job.devices)


def fingerprints(job: Job) -> dict[str, str]:
    """Hashes of what a run was begun with: base, adapter, the rows that each task uses."""
    rows = (
        {
            f"the {split} rows of task '{task.name}'": getattr(task, split)
            for task in job.stream
            for split in tasks.SPLITS
        }
        | {
            f"the rows of held-out task '{task.name}'": task.test
            for task in job.held_out
        }
        | {
            f"the memory rows of task '{task.name}'": kept
            for task, kept in zip(job.stream, job.memory, strict=False)
        }
    )
    found = {name: json.dumps(rows).encode() for name, rows in rows.items()}
    if job.start is not None:
        leaves = jax.tree.leaves(jax.device_get(job.start))
        found[f"lora.path '{job.cfg.lora.path}'"] = b"".join(leaves)
    return {f"model.path '{job.cfg.model.path}'": job.base.fingerprint} | {
        name: hashlib.sha256(content).hexdigest() for name, content in found.items()
    }


def too_long(job: Job, task: tasks.Task) -> int:
    """How many test labels of a task are longer than any answer, where they must be equal."""
    if task.metric != "exact":
        return 0
    counts = collections.Counter(row["output"] for row in task.test)
    rows = [{"id": "", "input": "", "output": label} for label in counts]
    whole = dataclasses.replace(job.text.data, max_target=1 << 30)
    examples = batches.encode(job.text._replace(data=whole), rows)
    lengths = [len(e.targets) for e in examples]
    # That has the start token, and a label the end token.
    most = job.cfg.eval.max_length
    return sum(n for n, k in zip(counts.values(), lengths, strict=True) if k > most)


def lesson(job: Job, number: int) -> Lesson:
    """Task `number` of the stream with what the earlier tasks leave it."""
    cfg, task = job.cfg, job.stream[number]
    seen = job.stream[number if job.method.alone else 0 : number + 1]
    held = tasks.validation(seen, cfg.train.validation_rows)
    kept = memory.fill(job.memory[:number])
    split = train_rows(job, number), held, kept
    train, held, kept = (batches.encode(job.text, rows) for rows in split)
    target = batches.longest_target(train + kept)
    return Lesson(task.name, number, train, held, kept, key(cfg, task), target)


def alone(job: Job, task: tasks.Task) -> Lesson:
    """`task` as the only one of a stream."""
    cfg = job.cfg.train
    rows, held = task.train, tasks.validation([task], cfg.validation_rows)
    if cfg.single_holdout:
        rows, held = tasks.holdout(task.train, cfg.single_holdout)
    train, held = (batches.encode(job.text, r) for r in (rows, held))
    target = batches.longest_target(train)
    return Lesson(task.name, 0, train, held, [], key(job.cfg, task), target)


def train_rows(job: Job, number: int) -> list[batches.Row]:
    """The rows that the method trains on at task `number` of the stream."""
    stream = [task.train for task in job.stream]
    if not job.method.rows:
        return stream[number]
    return job.method.rows(stream, number, memory.fill(job.memory[:number]))


def total_steps(job: Job, number: int) -> int:
    """Optimizer steps on task `number`; the memory up to it must be there."""
    return batches.total_steps(len(train_rows(job, number)), job.cfg.train)


def train_batch(
    job: Job, task: Lesson, step: int
) -> tuple[Tree, list[batches.Example]]:
    """The batch of a step on its devices, and its rows."""
    cfg = job.cfg.train
    chosen = [
        [task.train[i] for i in rows]
        for rows in batches.step_rows(len(task.train), cfg, task.key, step)
    ]
    batch = batches.collate(job.text, chosen, cfg.batch_size, cfg.average, task.target)
    return parallel.place(batch, job.devices), [e for m in chosen for e in m]


def memory_batch(
    job: Job, task: Lesson, places: Sequence[tuple[int, int]]
) -> tuple[Tree, list[list[batches.Example]]]:
    """Memory batches for (step, number) pairs, and their rows.

    Number 0 probes, others rehearse. One without rows, if there are no pairs.
    """
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
    batch = batches.stack(job.text, chosen or [[]], cfg.memory.batch_size, task.target)
    if getattr(cfg.method, "loss_scale", None) == "accumulation":
        batch["weights"] /= cfg.train.batch_size // cfg.train.micro
    return parallel.place(batch, job.devices), chosen


def key(cfg: config.Config, task: tasks.Task) -> tuple[int, int]:
    """Integers that decide every random choice on a task, wherever it is in the stream."""
    return cfg.train.seed, zlib.crc32(task.name.encode())
