"""How fast it is: `python -m aim_jax.benchmark --config configs/X.py [--set a.b=v ...]`.

Times what a run is made of, on rows of the config's second task or on random ones of one
length (`--length`). A model directory without weights gets random ones. JSON goes to
stdout, or to `--out` with a Markdown table beside it. Seconds are medians over rounds that
alternate between all that is timed; processor time is disturbed less by other processes.
FLOPs are those of matrix products that cannot be left out (`plan.Work`).
"""

import collections
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import aim_jax
from aim_jax import (
    config,
    evaluate,
    fusion,
    jobs,
    lora,
    methods,
    parallel,
    plan,
    records,
    run,
    steps,
)
from aim_jax.data import batches
from aim_jax.models import hf

Tree = Any
USUAL = ("start", "step", "rehearsal", "fusion", "decode")
MEASURES = (*USUAL, "idle", "padding", "first")
CLOCKS = {"seconds": time.perf_counter, "processor_seconds": time.process_time}
# Dense bf16 FLOP/s of a device by its kind. Sources: as `plan.CHIPS`; the data sheets of
# NVIDIA H100 (SXM) and H200, whose 1979e12 are with sparsity.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": plan.CHIPS["a100"].flops,
    "NVIDIA A100-SXM4-80GB": plan.CHIPS["a100"].flops,
    "NVIDIA H100 80GB HBM3": plan.CHIPS["h100"].flops,
    "NVIDIA H200": plan.CHIPS["h200"].flops,
    "TPU v5 lite": plan.CHIPS["v5e"].flops,
    "TPU v5": plan.CHIPS["v5p"].flops,
    "TPU v6 lite": plan.CHIPS["v6e"].flops,
}


class Shape(NamedTuple):
    """Random rows: how many a batch has, and their tokens.

    length: of an encoder's inputs, or of a decoder's whole row; target: of the answer.
    """

    rows: int
    length: int
    target: int


class Bench(NamedTuple):
    """What is measured on: a job and one of its tasks, and rows to decode.

    equal: all rows to train on are of one length, so that FLOPs can be told.
    """

    job: jobs.Job
    task: jobs.Lesson
    prompts: list[batches.Example]
    equal: bool


class Way(NamedTuple):
    """Something to time: `call()` does it `times` times.

    tokens, flops: of one time, 0 where that is not told; others: the same done elsewhere;
    brief: for what needs no compilation, shorter calls to warm up with.
    """

    call: Callable[[], Any]
    times: int
    tokens: float = 0
    flops: float = 0
    others: Mapping[str, Callable[[], Any]] = types.MappingProxyType({})
    brief: Mapping[str, Callable[[], Any]] = types.MappingProxyType({})


def with_weights(cfg: config.Config, folder: pathlib.Path) -> config.Config:
    """`cfg`, its model in `folder` with random weights where it has none."""
    source = hf.directory(cfg.model.path)
    kinds = ("safetensors", "bin", "pt", "pth")
    if any(found for kind in kinds for found in source.glob(f"*.{kind}")):
        return cfg
    family, model = hf.build(cfg.model)
    random = np.random.default_rng(0)
    flat = {}
    for path, leaf in hf.flatten(hf.abstract(model)).items():
        drawn = random.standard_normal(leaf.shape, np.float32)
        value = np.ones_like(drawn) if "norm" in path else 0.02 * drawn
        flat[path] = value.astype(jnp.dtype(cfg.model.dtype))
    hf.save(folder, hf.unflatten(flat), family.keys(model.config))
    for file in (source / "config.json", *hf.companions(source)):
        shutil.copy(file, folder)
    return _with(cfg, model={"path": str(folder)})


def of_shape(cfg: config.Config, shape: Shape) -> config.Config:
    """`cfg` for batches of that shape, of one compiled length.

    Its micro-batches, which PyTorch runs one by one, stay where they divide a batch.
    """
    micro = cfg.train.micro_batch_size
    if micro and shape.rows % micro:
        micro = None
    return _with(
        cfg,
        data={"buckets": (shape.length,), "target_buckets": (shape.target,)},
        train={"batch_size": shape.rows, "micro_batch_size": micro},
        memory={"batch_size": shape.rows},
        eval={"max_length": shape.target + 1},
    )


def plain(
    cfg: config.Config,
    shape: Shape,
    prompts: int,
    count: int,
    devices: parallel.Devices,
    base: hf.Base,
) -> Bench:
    """A job on `count` batches of random rows; its prompts are of unequal length."""
    rows, length, target = shape
    kind = base.family.KIND
    inputs = length if kind == "encdec" else length - target
    if inputs < 1:
        raise aim_jax.InputError(
            f"--length {length}: a decoder's row has its answer in it, --target {target}"
        )
    own, cfg = cfg, of_shape(cfg, shape)
    buckets = (*(n for n in own.data.buckets if n < length), length)
    told = records.read_json(hf.directory(cfg.model.path) / "config.json")
    eos = int(np.ravel(told.get("eos_token_id") or 1)[0])  # of several the first
    tokenizer = types.SimpleNamespace(eos_token_id=eos)
    data = dataclasses.replace(devices.sized(cfg.data), buckets=buckets)
    lora.targets(base.keys, cfg.lora)
    method = methods.module(cfg.method.name).make(cfg.method)
    job = jobs.partial(
        cfg=cfg,
        stream=[None, None],
        base=base,
        text=batches.Text(tokenizer, kind, data, devices.count),
        devices=devices,
        steps=jobs.compile_steps(base, cfg, devices, method),
        decode=evaluate.greedy(base.model, (eos,), cfg, devices),
        method=method,
        work=collections.Counter(),
    )
    random = np.random.default_rng(0)
    vocabulary = base.embedding.shape[0]

    def examples(lengths: Sequence[int]) -> list[batches.Example]:
        def tokens(n: int) -> np.ndarray:
            return random.integers(3, vocabulary, n, np.int32)

        return [
            batches.Example(str(i), tokens(n), tokens(target))
            for i, n in enumerate(lengths)
        ]

    equal = [inputs] * rows * count
    task = jobs.Lesson("random", 1, examples(equal), [], examples(equal), (0, 0))
    unequal = random.integers(-(-inputs // 8), inputs + 1, prompts)
    return Bench(job, task, examples(unequal), equal=True)


def real(cfg: config.Config, prompts: int) -> Bench:
    """The second task of the config's stream."""
    job = jobs.prepare(cfg, pathlib.Path())
    task, rows = _second(job), job.stream[1].test[:prompts]
    prompts_ = batches.encode(job.text, rows, truncate=False)
    return Bench(job, task, prompts_, equal=False)


def step(
    bench: Bench, others: Mapping[str, Any], rounds: int, count: int
) -> dict[str, Any]:
    """Train step, probe, and one after the other, on `count` batches."""
    job, task = bench.job, bench.task
    base, (state, memo) = job.base.params, _state(bench, count)
    trained = [jobs.train_batch(job, task, s) for s in range(1, count + 1)]
    probed = [jobs.memory_batch(job, task, [(s, 0)]) for s in range(1, count + 1)]
    micro = job.cfg.train.micro
    micros = [
        [rows[i : i + micro] for i in range(0, len(rows), micro)] for _, rows in trained
    ]
    recalled = [rows for _, (rows,) in probed]
    # As a DataLoader would, before it is their turn.
    ready = {
        name: [
            ([side.batch(m) for m in rows], side.batch(recall))
            for rows, recall in zip(micros, recalled, strict=True)
        ]
        for name, side in others.items()
    }
    losses = {"here": _loss(bench, micros[0][0])}
    for name, side in others.items():
        losses[name] = side.loss(ready[name][0][0][0])

    def train() -> Any:
        after = state
        for batch, _ in trained:
            after, measures = job.steps.train(base, after, memo, batch, None)
        return after, measures

    def probe() -> Any:
        return [job.steps.probe(base, state, memo, chunk) for chunk, _ in probed]

    def both() -> Any:
        after, read = state, []
        for (batch, _), (chunk, _) in zip(trained, probed, strict=True):
            after, measures = job.steps.train(base, after, memo, batch, chunk)
            read.append(measures)
        return after, read

    # What PyTorch has taken of a GPU it keeps, so that JAX must have its own before.
    jax.block_until_ready(both())
    others = {
        name: side
        for name, side in others.items()
        if _fits(name, side, *ready[name][0])
    }

    def theirs(training: bool, probing: bool) -> dict[str, Callable]:
        def call(name: str, side: Any) -> None:
            for micros, recall in ready[name]:
                if training:
                    side.train(micros)
                if probing:
                    side.probe(recall)

        return {
            name: functools.partial(call, name, side) for name, side in others.items()
        }

    learnt = sum(batches.tokens(rows) for _, rows in trained) / count
    read = sum(map(batches.tokens, recalled)) / count
    once = _forward(bench)
    train_flops, flops = once.trained, once.flops
    ways = {
        "train step": Way(
            train,
            count,
            learnt,
            train_flops,
            theirs(training=True, probing=False),
        ),
        "probe": Way(
            probe,
            count,
            read,
            flops,
            theirs(training=False, probing=True),
        ),
        "train step + probe": Way(
            both,
            count,
            learnt + read,
            train_flops + flops,
            theirs(training=True, probing=True),
        ),
    }
    return timed(ways, rounds) | {"loss without dropout": losses}


def rehearsal(bench: Bench, rounds: int) -> dict[str, Any]:
    """A step of rehearsal, in a call of `run.CHUNK`."""
    job, count = bench.job, run.CHUNK
    state, memo = _state(bench, count)
    places = [(1, number) for number in range(1, count + 1)]
    chunk, rows = jobs.memory_batch(job, bench.task, places)

    def call() -> Any:
        return job.steps.rehearse(job.base.params, state, memo, chunk, count)

    tokens = sum(map(batches.tokens, rows)) / count
    way = Way(call, count, tokens, _forward(bench).trained)
    return timed({f"rehearsal step, {count} a call": way}, rounds)


def fuse(bench: Bench, rounds: int, count: int) -> dict[str, Any]:
    """A fusion of adapters."""
    delta = _state(bench, count)[0].delta

    def call() -> Any:
        return [fusion.fuse(delta, delta, delta, 0.5, 0.5) for _ in range(count)]

    return timed({"fusion": Way(call, count)}, rounds)


def decode(bench: Bench, others: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Evaluation: all prompts decoded, whatever their lengths.

    The others decode them one by one, as the release does, and in batches as they come.
    """
    job, prompts = bench.job, bench.prompts
    delta, said = jobs.fresh(job), {}

    def ours() -> None:
        said["here"] = run.decoded(job, job.decode, delta, prompts)

    def theirs(name: str, side: Any, rows: int, prompts: list) -> None:
        said[name] = side.generate(prompts, rows)

    calls, brief = {}, {}
    for name, side in others.items():
        ways = {"one by one": 1, "batched": job.cfg.eval.batch_size}
        for way, rows in ways.items():
            key = f"{name}, {way}"
            calls[key] = functools.partial(theirs, key, side, rows, prompts)
            brief[key] = functools.partial(theirs, key, side, rows, prompts[:2])
    ours()  # compiles, and tells how many tokens there are
    count = sum(map(len, said["here"]))
    way = Way(ours, 1, count, 0, calls, brief)
    found = timed({f"decoding, {len(prompts)} rows": way}, rounds)
    if others:
        found["rows of the same tokens"] = {
            key: sum(map(np.array_equal, said["here"], said[key])) for key in calls
        }
    return found


def start(command: Sequence[str]) -> dict[str, Any]:
    """Seconds to the first step, cold and with the compilation cache; weights; memory.

    command: the flags of processes that measure `first`.
    """
    words = [sys.executable, "-m", "aim_jax.benchmark", "--measure=first"]
    runs = []
    with tempfile.TemporaryDirectory() as cache:
        own = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        }
        for _ in range(2):
            began = time.time()
            done = subprocess.run(
                [*words, *command], env=os.environ | own, capture_output=True, text=True
            )
            if done.returncode:
                raise aim_jax.InputError(f"--measure start: {done.stderr.strip()}")
            runs.append(json.loads(done.stdout) | {"began": began})
    weights, found = runs[-1]["weights"], {}
    for cache, r in zip(("nothing compiled", "compilation cache"), runs, strict=True):
        for moment, clocks in r["moments"].items():
            found[f"first step + probe {moment}, {cache}"] = {
                "seconds": clocks["time"] - r["began"] - r["weights"]["seconds"],
                "processor_seconds": clocks["processor_seconds"],
            }
    size = weights["bytes"]
    rate = {"bytes_per_second": size / weights["seconds"]}
    return found | {
        f"loading of the weights, {size / 1e9:.3g} GB": weights | rate,
        "peak memory": {"bytes": runs[-1]["peak_bytes"]},
    }


def first(cfg: config.Config, shape: Shape) -> dict[str, Any]:
    """What `start` is made of, in this process: all before its first step, and the step.

    moments: when the step was on its way, all compiled, and when it was done.
    processor_seconds: of the process until then, without the loading of the weights.
    """
    devices = jobs.open_devices(cfg)
    base, spent = elapsed(lambda: hf.load(cfg.model, devices))
    bench = plain(cfg, shape, 1, 1, devices, base)
    job, (state, memo) = bench.job, _state(bench, 1)
    batch, _ = jobs.train_batch(job, bench.task, 1)
    chunk, _ = jobs.memory_batch(job, bench.task, [(1, 0)])
    moments = {}

    def now(moment: str) -> None:
        moments[moment] = {
            "time": time.time(),
            "processor_seconds": time.process_time() - spent["processor_seconds"],
        }

    after = job.steps.train(base.params, state, memo, batch, chunk)
    now("sent")
    jax.block_until_ready(after)
    now("done")
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "moments": moments,
        "weights": {
            **spent,
            "bytes": sum(x.nbytes for x in jax.tree.leaves(base.params)),
        },
        "peak_bytes": stats.get(
            "peak_bytes_in_use",
            1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        ),
    }


def timed(ways: Mapping[str, Way], rounds: int) -> dict[str, Any]:
    """A row of figures for each way, by name."""
    calls = {}
    for name, way in ways.items():
        calls[name, ""] = way.call, way.call
        for other, call in way.others.items():
            calls[name, other] = call, way.brief.get(other, call)
    spent = clocked(calls, rounds)
    return {name: _row(name, way, spent) for name, way in ways.items()}


def clocked(
    calls: Mapping[Any, tuple[Callable, Callable]], rounds: int
) -> dict[Any, dict[str, list[float]]]:
    """What each of `CLOCKS` says of each (call, call to warm up with), round by round."""
    spent = {key: {clock: [] for clock in CLOCKS} for key in calls}
    for _, warm in calls.values():
        jax.block_until_ready(warm())
    for _ in range(rounds):
        for key, (call, _) in calls.items():
            for name, seconds in elapsed(call)[1].items():
                spent[key][name].append(seconds)
    return spent


def elapsed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a call returns, once it is there, and its seconds by each of `CLOCKS`."""
    began = [clock() for clock in CLOCKS.values()]
    made = jax.block_until_ready(call())
    pairs = zip(CLOCKS.items(), began, strict=True)
    return made, {name: clock() - then for (name, clock), then in pairs}


def idle(bench: Bench, rounds: int) -> dict[str, Any]:
    """Milliseconds a step of the task, and the share the device is idle.

    `device` sends all train steps and probes without reading anything, from batches
    that lie ready; what a loop needs beyond that, the device waits for: `plain`, and
    `speculative`, where the next step is sent before the signals of the last are read.
    """
    job, task = bench.job, bench.task
    # It probes and never merges, so that all ways do the same work.
    hooks = dict.fromkeys(("before_task", "after_step", "after_task", "status"))
    watched = dataclasses.replace(job, method=job.method._replace(probe=1, **hooks))
    start = run.beginning(watched)
    total = batches.total_steps(len(task.train), job.cfg.train)
    ready = [
        (jobs.train_batch(job, task, s)[0], jobs.memory_batch(job, task, [(s, 0)])[0])
        for s in range(1, total + 1)
    ]

    def loop(speculate: bool) -> Any:
        own = _with(
            job.cfg,
            parallel={"speculate": speculate},
            train={"eval_every": total + 1},
        )
        nothing = [lambda *given: None] * 2
        alike = dataclasses.replace(watched, cfg=own)
        return run.train(alike, task, start, *nothing).state

    def device() -> Any:
        after, read = start.state._replace(total=np.int32(total)), []
        after = parallel.replicate(after, job.devices)
        for batch, memory in ready:
            given = job.base.params, after, start.memo.arrays, batch, memory
            after, measures = job.steps.train(*given)
            read.append(measures)
        return after, read

    ways = {
        "device": device,
        "plain": lambda: loop(False),
        "speculative": lambda: loop(True),
    }
    spent = clocked({name: (way, way) for name, way in ways.items()}, rounds)
    seconds = {k: statistics.median(v["seconds"]) / total for k, v in spent.items()}
    return {
        "milliseconds a step": {k: round(1000 * s, 3) for k, s in seconds.items()},
        "idle": {
            k: round(1 - seconds["device"] / seconds[k], 4)
            for k in ("plain", "speculative")
        },
        "steps": total,
    }


def padding(cfg: config.Config) -> dict[str, Any]:
    """Input tokens that the train steps run over for a real one, an epoch of each task.

    `parts`: sorted within a batch and cut to a bucket; `batch`: a whole batch in the
    bucket of its longest row; `micro_batches`: as rows come, each micro-batch as long as
    its longest row. `lengths`: all that a part is cut to. `decoding`: of evaluation.
    """
    cfg = _with(cfg, train={"epochs": 1})
    job = jobs.prepare(cfg, pathlib.Path())
    micro = cfg.train.micro
    buckets = sorted(cfg.data.buckets)
    ran, real, lengths = collections.Counter(), 0, set()
    for number in range(len(job.stream)):
        task = jobs.lesson(job, number)
        for step in range(1, batches.total_steps(len(task.train), cfg.train) + 1):
            batch, examples = jobs.train_batch(job, task, step)
            rows = [batches.longest(job.text, [e]) for e in examples]
            full, least = batch["inputs"].shape[-1], batch["targets"].shape[-1]
            sizes = np.array(batches.cuts(buckets, full, least))
            used = np.asarray(batch["mask"]).sum(-1).max(-1)
            cut = sizes[np.searchsorted(sizes, used[used > 0])]
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
        "decoding": decoded(job),
    }


def decoded(job: jobs.Job) -> dict[str, float]:
    """What an evaluation of all tasks runs over, were all answers the reference's.

    `tokens`: of prompts, for a real one; `steps`: of a place, for a token that a row needs;
    `shared`: the part of prompt tokens that all rows of a task begin with.
    """
    count: collections.Counter[str] = collections.Counter()
    examples = []
    for task in job.stream:
        own = batches.encode(job.text, task.test, truncate=False)
        examples += own
        prompts = [e.inputs.tolist() for e in own]
        count["shared"] += len(prompts) * len(os.path.commonprefix(prompts))
    count["real"] = sum(len(e.inputs) for e in examples)
    count["needed"] = sum(len(e.targets) for e in examples)

    # A pool without a model; its `count` is of the tokens that a row has yet to say.
    def empty(base: Any, delta: Any, batch: Any, key: Any, rows: int) -> evaluate.Pool:
        left = np.zeros(rows, int)
        cache = {"mask": np.zeros((rows, batch["mask"].shape[1]))}
        return evaluate.Pool(cache, np.zeros((rows, 0)), left, left == 0)

    def widen(pool: evaluate.Pool, extra: int) -> evaluate.Pool:
        cache = {"mask": np.pad(pool.cache["mask"], ((0, 0), (0, extra)))}
        return pool._replace(cache=cache)

    def fill(
        base: Any, delta: Any, pool: evaluate.Pool, batch: Any, places: Any, key: Any
    ) -> evaluate.Pool:
        count["tokens"] += batch["inputs"].size
        count["steps"] += len(places)
        left = pool.count.copy()
        for place, number in zip(np.asarray(places), batch["number"], strict=True):
            if place < len(left):
                left[place] = len(examples[int(number)].targets) - 1
        return pool._replace(count=left, done=left == 0)

    def run(base: Any, delta: Any, pool: evaluate.Pool, least: int) -> evaluate.Pool:
        steps = np.sort(pool.count)[least - 1]
        count["steps"] += int(steps) * len(pool.count)
        left = np.maximum(pool.count - steps, 0)
        return pool._replace(count=left, done=left == 0)

    evaluate.generate(
        evaluate.Decoder(empty, widen, fill, run),
        {},
        {},
        job.text,
        examples,
        job.cfg.eval.batch_size,
        parallel.open_devices(config.Parallel(mode="jit"), devices=jax.devices()[:1]),
    )
    return {
        "tokens": round(count["tokens"] / count["real"], 3),
        "steps": round(count["steps"] / count["needed"], 3),
        "shared": round(count["shared"] / count["real"], 3),
    }


def machine(dtype: str) -> dict[str, Any]:
    """Processor, cores of this process, and a device's rate in products of matrices.

    The clock of rates: on a CPU processor time, hence rates of a core.
    """
    cpu = jax.default_backend() == "cpu"
    size, clock = (2048, "processor_seconds") if cpu else (8192, "seconds")
    times = 1 if cpu else 20  # to send one takes a part of its time
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)

    def products() -> Any:
        return [product(x, x) for _ in range(times)][-1]

    spent = clocked({"": (products, products)}, 5)
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "matrix_flops_per_second": times * 2 * size**3 / min(spent[""][clock]),
        "clock": clock,
    }


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table, what they were taken on, and what is no row of it."""
    rows = {k: v for k, v in result["measures"].items() if "seconds" in v}
    others = list(dict.fromkeys(o for r in rows.values() for o in r.get("against", ())))
    head = ["", "s", "processor s", "tokens/s", "GFLOP/s", "of the matrix rate", "MFU"]
    head += [f"/ {other} (processor)" for other in others]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, row in rows.items():
        cells = [name, f"{row['seconds']:.4g}", f"{row['processor_seconds']:.4g}"]
        for key, form in (
            ("tokens_per_second", ",.0f"),
            ("gflops_per_second", ",.4g"),
            ("of_matrix_rate", ".0%"),
            ("mfu", ".0%"),
        ):
            cells.append(format(row[key], form) if key in row else "")
        for other in others:
            beside = row.get("against", {}).get(other)
            cells.append(
                f"{beside['ratio']:.2f} ({beside['processor_ratio']:.2f})"
                if beside
                else ""
            )
        lines.append(cells)
    rest = {k: v for k, v in result.items() if k != "measures"} | {
        k: v for k, v in result["measures"].items() if k not in rows
    }
    table = [f"| {' | '.join(line)} |" for line in lines] if rows else []
    told = [f"- {name}: {json.dumps(value)}" for name, value in rest.items()]
    return "\n".join([*table, "", *told, ""])


def benchmark(
    cfg: config.Config,
    shape: Shape | None,
    measures: Sequence[str] = USUAL,
    *,
    prompts: int = 64,
    rounds: int = 5,
    count: int = 2,
    against: str | None = None,
    compiled: bool = False,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """All that the command prints. count: steps of a round; command: flags for `start`.

    Against the release, its recorded run is measured, in place of `cfg`.
    """
    found: dict[str, Any] = {}
    if against == "release":
        measures = ()
        found = beside("against_release").replay()
    if "start" in measures:  # while no device is held here
        found |= start(command)
    here = machine(cfg.model.dtype)
    versions = run.versions()
    if {"step", "rehearsal", "fusion", "decode", "idle"} & set(measures):
        if shape:
            devices = jobs.open_devices(cfg)
            base = hf.load(cfg.model, devices)
            bench = plain(cfg, shape, prompts, count, devices, base)
        else:
            bench = real(cfg, prompts)
        others = {}
        if against == "torch":
            others = beside("against_torch").sides(bench.job, compiled)
            names = ("torch", "peft")
            versions |= {name: importlib.metadata.version(name) for name in names}
        eager = {k: v for k, v in others.items() if k == "torch"}
        if "decode" in measures:  # while the adapters of the others are fresh
            found |= decode(bench, eager, rounds)
        if "step" in measures:
            found |= step(bench, others, rounds, count)
        if "rehearsal" in measures:
            found |= rehearsal(bench, rounds)
        if "fusion" in measures:
            found |= fuse(bench, rounds, count)
        if "idle" in measures:
            found["idle"] = idle(bench, rounds)
    if "padding" in measures:
        found["padding"] = padding(cfg)
    peak = PEAKS.get(jax.devices()[0].device_kind)
    if cfg.model.dtype != "bfloat16":
        peak = None
    for row in found.values():
        if "gflops" in row:
            rate = row["gflops"] * 1e9 / row[here["clock"]] / jax.device_count()
            row["of_matrix_rate"] = rate / here["matrix_flops_per_second"]
            if peak:
                row["mfu"] = rate / peak
    return {
        "measures": found,
        "rounds": rounds,
        "steps": count,
        "machine": here,
        "versions": versions,
    }


def beside(name: str) -> types.ModuleType:
    """A module of tests/: it needs packages that nothing else here needs."""
    file = pathlib.Path(aim_jax.__file__).parents[1] / "tests" / f"{name}.py"
    if not file.is_file():
        raise aim_jax.InputError(
            f"--against: needs tests/{file.name} of a checkout of aim_jax"
        )
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise aim_jax.InputError(
            f"--against: {error}; pip install -r tests/requirements.txt"
        ) from None


def _with(cfg: config.Config, **sections: dict[str, Any]) -> config.Config:
    """`cfg` with fields of sections changed."""
    parts = {
        name: dataclasses.replace(getattr(cfg, name), **values)
        for name, values in sections.items()
    }
    return dataclasses.replace(cfg, **parts)


def _second(job: jobs.Job) -> jobs.Lesson:
    """The second task, with what is remembered of the first."""
    if len(job.stream) < 2 or not job.memory:
        raise aim_jax.InputError(
            "the second task of a stream is measured, with what its method remembers of"
            f" the first; this stream has {len(job.stream)} tasks, and the memory of method"
            f" {job.cfg.method.name} {sum(map(len, job.memory))} rows"
        )
    return jobs.lesson(job, 1)


def _state(bench: Bench, count: int) -> tuple[steps.State, Tree]:
    """The state before `count` steps, and the arrays of the method's memo."""
    job = bench.job
    place = run.beginning(job)
    state = steps.init(place.state.delta, count, jax.random.key(0), job.method)
    return parallel.replicate((state, place.memo.arrays), job.devices)


def _forward(bench: Bench) -> plan.Work:
    """Matrix products of a forward pass over a batch, where they can be told."""
    job = bench.job
    if not bench.equal:
        return plan.Work()
    pure = steps.make(job.base.model, job.cfg, methods.Method())
    rows = job.cfg.memory.batch_size
    chunk = batches.stack(job.text, [bench.task.memory[:rows]], rows)
    arguments = (job.base.params, _state(bench, 1)[0], (), chunk)
    return plan.counted(jax.make_jaxpr(pure.probe)(*arguments).jaxpr)


def _fits(name: str, side: Any, micros: Sequence[Any], recalled: Any) -> bool:
    """Whether another way has room for a train step and a probe; if not, that is said."""
    lacking = side.lacking(micros, recalled)
    if lacking:
        print(f"{name} is left out: {lacking}", file=sys.stderr)
    return not lacking


def _loss(bench: Bench, rows: list[batches.Example]) -> float:
    """Mean loss of a token without dropout."""
    job = bench.job
    batch = batches.collate(job.text, [rows], len(rows))
    placed = parallel.place(batch, job.devices)
    total = job.steps.validate(job.base.params, jobs.fresh(job), placed)
    return float(total) / float(batch["weights"].sum())


def _row(name: str, way: Way, spent: dict[Any, dict[str, list[float]]]) -> dict:
    """Figures of a way: a time, what it comes to a second, and how it compares."""
    ours = spent[name, ""]
    row: dict[str, Any] = {k: statistics.median(v) / way.times for k, v in ours.items()}
    if way.tokens:
        row["tokens_per_second"] = way.tokens / row["seconds"]
    if way.flops:
        row["gflops"] = way.flops / 1e9
        row["gflops_per_second"] = row["gflops"] / row["seconds"]
    if way.others:
        row["against"] = {
            o: _beside(ours, spent[name, o], way.times) for o in way.others
        }
    return row


def _beside(ours: dict, theirs: dict, times: int) -> dict[str, float]:
    """Their time, and the median over rounds of ours divided by theirs."""
    found = {}
    for clock, ratio in zip(CLOCKS, ("ratio", "processor_ratio"), strict=True):
        pairs = zip(ours[clock], theirs[clock], strict=True)
        found[clock] = statistics.median(theirs[clock]) / times
        found[ratio] = statistics.median(a / b for a, b in pairs)
    return found


def main(argv: list[str]) -> None:
    """Measure and print."""
    # Other processes, and PyTorch in this one, need room on a GPU too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    flag = flags.FLAGS
    with aim_jax.command(argv), tempfile.TemporaryDirectory() as scratch:
        out = pathlib.Path(flag.out).expanduser() if flag.out else None
        if out and (out.suffix != ".json" or not out.parent.is_dir()):
            raise aim_jax.InputError(
                f"--out {out}: must end in .json, in a folder that is there"
            )
        cfg = config.load(flag.config, flag.set)
        cfg = with_weights(cfg, pathlib.Path(scratch))
        small = Shape(flag.rows, flag.length or cfg.data.buckets[0], flag.target)
        if flag.measure == ["first"]:
            print(json.dumps(first(cfg, small)))
            return
        command = [f"--config={flag.config}", *(f"--set={s}" for s in flag.set)]
        command += [f"--set=model.path={cfg.model.path}"]
        command += [f"--{k}={v}" for k, v in small._asdict().items()]
        result = benchmark(
            cfg,
            small if flag.length else None,
            flag.measure,
            prompts=flag.prompts,
            rounds=flag.rounds,
            count=flag.steps,
            against=flag.against,
            compiled=flag.compile,
            command=command,
        )
        result = {"command": shlex.join(sys.orig_argv[1:]), **result}
        text = json.dumps(result, indent=1)
        if not out:
            print(text)
            return
        try:
            out.write_text(text + "\n")
            out.with_suffix(".md").write_text(markdown(result))
        except OSError as error:
            print(text)  # It took minutes.
            raise aim_jax.InputError(f"--out {out}: {error.strerror}") from None


if __name__ == "__main__":
    aim_jax.keep_memory()
    flags.DEFINE_string("config", "configs/quickstart.py", "Config file.")
    flags.DEFINE_multi_string("set", [], "section.field=value; may be repeated.")
    flags.DEFINE_multi_enum("measure", USUAL, MEASURES, "May be repeated.")
    flags.DEFINE_integer("length", None, "Random rows of so many tokens.", 1)
    flags.DEFINE_integer("rows", 8, "With --length: rows of a batch.", 1)
    flags.DEFINE_integer("target", 8, "With --length: tokens of an answer.", 1)
    flags.DEFINE_integer("prompts", 64, "Rows to decode.", 2)
    flags.DEFINE_integer("rounds", 5, "Alternating rounds.", 1)
    flags.DEFINE_integer("steps", 2, "Steps of a round.", 1)
    flags.DEFINE_enum("against", None, ["torch", "release"], "What to compare with.")
    flags.DEFINE_bool("compile", False, "With --against=torch: torch.compile too.")
    flags.DEFINE_string("out", None, "JSON file; a Markdown table comes beside it.")
    app.run(main)
