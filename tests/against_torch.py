"""Train step and probe beside those of transformers and PEFT, on the same rows.

    PYTHONPATH=. taskset -c 0 python tests/against_torch.py --config configs/X.py [--set a.b=v ...]

prints JSON: seconds a step, and ratios of the times, which are medians over rounds that
alternate between the two. The second task of the stream is trained on; encoder-decoder
models only. Under taskset both have one thread.
"""

import importlib.metadata
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import peft
import torch
import transformers
from absl import app, flags

from aim_jax import config, run, steps
from aim_jax.models import hf


def compare(cfg: config.Config, rounds: int, count: int) -> dict[str, Any]:
    """Seconds of `count` train steps, and of their probes, here and in PyTorch.

    As its users run it: eager, the base in training mode (dropout), each micro-batch
    padded to its longest row, logits at all positions. `cpu` is the processor time of the
    process, which other processes disturb less than the clock.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = run.prepare(cfg, pathlib.Path(folder))
    task, micro = run.lesson(job, 1), cfg.train.micro_batch_size or cfg.train.batch_size
    made = [
        (run.train_batch(job, task, s), run.memory_batch(job, task, [(s, 0)]))
        for s in range(1, count + 1)
    ]
    trained = [
        [rows[i : i + micro] for i in range(0, len(rows), micro)]
        for (_, rows), _ in made
    ]
    recalled = [rows for _, (_, rows) in made]
    state = steps.init(run.fresh(job), count, jax.random.key(0))
    state = jax.device_put(state, job.devices.replicated)
    base, torch_train, torch_probe = job.base.params, *_torch(cfg, job)

    def train() -> Any:
        after = state
        for (batch, _), _ in made:
            after, measures = job.steps.train(base, after, (), batch)
        return after, measures

    def probe() -> Any:
        return [job.steps.probe(base, state, (), chunk) for _, (chunk, _) in made]

    ways = {
        ("train", "jax"): train,
        ("train", "torch"): lambda: [torch_train(rows) for rows in trained],
        ("probe", "jax"): probe,
        ("probe", "torch"): lambda: [torch_probe(*rows) for rows in recalled],
    }
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    spent: dict[Any, list[float]] = {(*way, c): [] for way in ways for c in clocks}
    for number in range(rounds + 1):
        for way, call in ways.items():
            began = {name: clock() for name, clock in clocks.items()}
            jax.block_until_ready(call())
            for name, clock in clocks.items():
                if number:  # the first round compiles
                    spent[*way, name].append((clock() - began[name]) / count)

    def ratio(*parts: str, clock: str) -> float:
        """Median over rounds of JAX's time over PyTorch's."""
        ours, theirs = (
            [sum(v) for v in zip(*(spent[p, w, clock] for p in parts), strict=True)]
            for w in ("jax", "torch")
        )
        return round(
            statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3
        )

    return {
        "seconds a step": {
            " ".join(way): round(statistics.median(values), 4)
            for way, values in spent.items()
        },
        "jax / torch": {
            clock: {
                "train": ratio("train", clock=clock),
                "probe": ratio("probe", clock=clock),
                "both": ratio("train", "probe", clock=clock),
            }
            for clock in clocks
        },
        "rows": cfg.train.batch_size,
        "rounds": rounds,
        "steps": count,
        "versions": run.versions()
        | {name: importlib.metadata.version(name) for name in ("torch", "peft")},
    }


def _torch(cfg: config.Config, job: run.Job) -> tuple[Callable, Callable]:
    """Train step and probe on lists of examples, by transformers and PEFT."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = hf.directory(cfg.model.path)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=cfg.lora.r,
            lora_alpha=cfg.lora.alpha,
            lora_dropout=cfg.lora.dropout,
            target_modules=list(cfg.lora.target),
        ),
    ).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=cfg.train.learning_rate, weight_decay=0)

    def padded(rows: Sequence[Any], fill: int) -> Any:
        made = np.full((len(rows), max(map(len, rows))), fill)
        for line, row in zip(made, rows, strict=True):
            line[: len(row)] = row
        return torch.from_numpy(made)

    def loss(examples: list) -> Any:
        inputs = padded([e.inputs for e in examples], 0)
        mask = padded([np.ones_like(e.inputs) for e in examples], 0)
        labels = padded([e.targets for e in examples], -100)
        return model(input_ids=inputs, attention_mask=mask, labels=labels).loss

    def train(micros: list) -> float:
        optimizer.zero_grad()
        total = 0.0
        for micro in micros:
            value = loss(micro) / len(micros)
            value.backward()
            total += value.item()
        torch.nn.utils.clip_grad_norm_(weights, cfg.train.clip_norm)
        optimizer.step()
        return total

    def probe(examples: list) -> float:
        with torch.no_grad():
            return loss(examples).item()

    return train, probe


def main(argv: list[str]) -> None:
    """Measure and print."""
    flag = flags.FLAGS
    cfg = config.load(flag.config, flag.set)
    print(json.dumps(compare(cfg, flag.rounds, flag.steps), indent=1))


if __name__ == "__main__":
    flags.DEFINE_string("config", "configs/quickstart.py", "Config file.")
    flags.DEFINE_multi_string("set", [], "section.field=value; may be repeated.")
    flags.DEFINE_integer("rounds", 3, "Alternating rounds.", lower_bound=1)
    flags.DEFINE_integer("steps", 2, "Steps of a round.", lower_bound=1)
    app.run(main)
