"""The recorded run of the PyTorch release, read for the tests that compare with it.

A golden directory holds the arrays that its README.md describes. It is `$AIM_JAX_GOLDEN`,
or `../shared/golden` beside the repository; any directory of that format will do. Nothing
here computes what is compared, and nothing here imports jax.
"""

import functools
import gzip
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from aim_jax import config, controller
from aim_jax.data import batches
from aim_jax.methods import aim

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = pathlib.Path(os.environ.get("AIM_JAX_GOLDEN", ROOT / "../shared/golden"))

needed = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no recorded run in {FOLDER}; see AIM_JAX_GOLDEN"
)
# Whole benchmarks, in the layout of `data.root`.
DATA = ROOT / "../shared/data"
benchmarks = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"no benchmark data in {DATA}"
)

Trace = dict[str, np.ndarray]

# Inputs up to this length are compiled as one; what always runs needs no other.
SHORT = 336


def _names(kind: str) -> list[str]:
    """Stems of the recorded tasks' files, in stream order."""
    found = FOLDER.glob(f"task*_{kind}.npz")
    return sorted((p.stem for p in found), key=lambda n: int(re.findall(r"\d+", n)[0]))


CONTINUAL = _names("ours")
SINGLE = _names("fwt")


@functools.cache
def trace(name: str) -> Trace:
    """The arrays of a recorded task."""
    with np.load(FOLDER / f"{name}.npz") as data:
        return dict(data)


def read(name: str) -> Any:
    """A JSON file, gzipped or not."""
    data = (FOLDER / name).read_bytes()
    return json.loads(gzip.decompress(data) if name.endswith(".gz") else data)


def options(hyper: dict[str, Any]) -> aim.Options:
    """Fields of the method for the release's hyper-parameters."""
    return aim.Options(
        interval=hyper["inner_iterations"],
        rehearsal=hyper["outer_iterations"],
        cold_start=hyper["cold_start_step"],
        min_interval=hyper["min_step_len"],
        max_interval=hyper["max_step_len"],
        threshold_factor=hyper["threshold_factor"],
        learning_signal=hyper["adaptive_merge_flag"],
    )


def settings() -> config.Config:
    """The config of the recorded run, in few input lengths: each is compiled once."""
    hyper = read("hyperparameters.json")
    common, sequence = hyper["common"], hyper["sequence"]
    return config.resolve(
        config.Config(
            model=config.Model(path=str(FOLDER / "base")),
            data=config.Data(
                benchmark="custom",
                root=str(FOLDER / "data"),
                tasks=tuple(hyper["order"]),
                buckets=(SHORT, 512, 1024),
                device_rows=8,
            ),
            memory=config.Memory(
                percent=sequence["memory_data_ratio"],
                batch_size=sequence["train_batch_size_outer"],
            ),
            train=config.Train(
                epochs=common["num_epochs"],
                batch_size=common["batch_size"],
                micro_batch_size=common["micro_batch_size"],
                learning_rate=common["learning_rate"],
            ),
            lora=config.Lora(
                r=common["lora_r"],
                alpha=common["lora_alpha"],
                dropout=common["lora_dropout"],
            ),
            method=options(sequence),
        )
    )


def accumulation(cfg: config.Config) -> int:
    """Micro-batches of an optimizer step (GA)."""
    return cfg.train.batch_size // cfg.train.micro_batch_size


def examples(data: Trace, rows: Iterable[int]) -> list[batches.Example]:
    """Rows of the token table; -1 marks no row."""
    return [
        batches.Example(
            str(data["tab_sample_id"][r]),
            data["tab_input_ids"][r, : data["tab_input_len"][r]].astype(np.int32),
            data["tab_label_ids"][r, : data["tab_label_len"][r]].astype(np.int32),
        )
        for r in rows
        if r >= 0
    ]


def train_batch(text: batches.Text, cfg: config.Config, data: Trace, step: int) -> Any:
    """The recorded micro-batches of an optimizer step (from 1)."""
    micros = data["mb_rows"][data["mb_step"] == step]
    return batches.collate(
        text,
        [examples(data, rows) for rows in micros],
        cfg.train.batch_size,
        cfg.train.average,
    )


def memory_batch(
    text: batches.Text, cfg: config.Config, data: Trace, rows: Sequence[np.ndarray]
) -> Any:
    """Recorded memory batches; their loss is over GA, as the release has it."""
    batch = batches.stack(
        text, [examples(data, r) for r in rows], cfg.memory.batch_size
    )
    batch["weights"] /= accumulation(cfg)
    return batch


def replay(
    rules: controller.Rules,
    history: Sequence[float],
    learning: Iterable[float],
    last: int | None = None,
) -> Iterable[tuple[int, bool, controller.Controller, controller.Controller]]:
    """Rows (step, merged, controller at the decision, controller after the step).

    The controller of the package, fed with the recorded memory losses of steps 1.. and
    the learning signals of the merges.
    """
    control, signals = controller.start(rules), iter(learning)
    for step, loss in enumerate(history[:last], 1):
        decided = control = controller.observe(control, rules, step, float(loss))
        merged = controller.decide(control, rules, step, len(history))
        if merged:
            control = controller.merged(control, rules, step, float(next(signals)))
        yield step, merged, decided, control
