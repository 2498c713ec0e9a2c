"""Published results that a run can be held against: `configs/published.json`.

Every entry says where its numbers are from (`source`) and how they are known
(`confidence`: `direct` from the source, `secondary` from a transcription, `derived`).
"""

import functools
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import aim_jax
from aim_jax import records
from aim_jax.data import tasks

FILE = pathlib.Path(aim_jax.__file__).parents[1] / "configs" / "published.json"

# What papers call the methods of this package.
NAMES = {
    "aim": ("AimMerging",),
    "ewc": ("EWC",),
    "forever": ("FOREVER",),
    "inc_lora": ("IncLoRA",),
    "magmax": ("MagMax",),
    "migu": ("LoRA + MIGU",),
    "multitask": ("MTL",),
    "olora": ("O-LoRA",),
    "recurrent_kif": ("Recurrent-KIF",),
    "replay": ("MixReplay", "LoRAReplay", "SeqLoRAReplay"),
    "replay_interval": ("Fixed-interval replay",),
    "sequential": ("SeqLoRA",),
    "single": ("PerTaskFT",),
    "slao": ("SLAO",),
    "tasl": ("TaSL",),
}


@functools.cache
def entries() -> list[dict[str, Any]]:
    """All there are; scores in percent. None without the file (it is no part of a wheel)."""
    return json.loads(FILE.read_text("utf-8")) if FILE.is_file() else []


def order(run: records.Run) -> int | None:
    """The number of the order that `run` follows; None for a stream of its own."""
    known = tasks.BENCHMARKS.get(run.settings.get("data.benchmark"))
    number = run.settings.get("data.order")
    if known is None or not known.orders or run.settings.get("data.tasks"):
        return None
    return next(iter(known.orders)) if number is None else number


def same_benchmark(run: records.Run) -> list[dict[str, Any]]:
    """Entries for the order of `run`, or for the mean over the orders of its benchmark."""
    number, benchmark = order(run), run.settings.get("data.benchmark")
    return [
        entry
        for entry in entries()
        if number is not None
        and entry["benchmark"] == benchmark
        and entry["order"] in (number, None)
    ]


def matching(runs: Iterable[records.Run]) -> list[dict[str, Any]]:
    """Entries for benchmark, order and base model of any of `runs`, each once.

    Those of the methods that ran come first, then by OP, best first.
    """
    found, methods = [], set()
    for run in runs:
        methods |= set(NAMES.get(run.method, ()))
        base = model(run.settings.get("model.path", ""))
        found += [
            entry
            for entry in same_benchmark(run)
            if model(entry["model"]) == base and entry not in found
        ]
    return sorted(
        found,
        key=lambda e: (e["method"] not in methods, e["op"] is None, -(e["op"] or 0)),
    )


def model(path: str) -> str:
    """The name of a base model in letters and digits: of a directory, hub id or table.

    `meta-llama/Llama-2-7b-chat-hf` and `LLaMA2-7B-chat` are the same.
    """
    name = re.sub(r"[^a-z0-9]", "", pathlib.PurePath(path).name.lower())
    return name.removeprefix("meta").removesuffix("hf")
