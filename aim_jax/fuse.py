"""Merge PEFT adapters, from a run or from anywhere, into one.

    python -m aim_jax.fuse --method ties --space product ADAPTER... --out DIR

An ADAPTER is a folder with adapter_config.json and adapter_model.safetensors, or a hub id;
DIR becomes one that `peft.PeftModel` loads, with the settings of the first. The base model
is not needed. `aim_jax.fusion` and docs/merging.md have the rules. In product space ranks
and alphas may differ. `--method fisher` reads the mean squared gradients of an adapter's
tensors, under the same names, from fisher.safetensors in its folder.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

import aim_jax
from aim_jax import export, fusion, lora
from aim_jax.models import hf

FISHER = "fisher.safetensors"
FIELDS = dataclasses.fields(fusion.Rule)[1:]  # beside its name


def fuse(
    folders: Sequence[pathlib.Path],
    rule: fusion.Rule,
    out: pathlib.Path,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> None:
    """Merge the adapters in `folders` into the new folder `out`.

    Raises InputError, before anything is written, for adapters that cannot be read or are
    not finite, and for those that do not go together, naming adapter and tensor.
    """
    if not folders:
        raise aim_jax.InputError("no adapters; name the folders of one or more")
    aim_jax.check_new(out)
    if rank is not None and (rank < 1 or rule.space == "factor"):
        raise aim_jax.InputError(
            f"--rank {rank}: must be at least 1, and is for --space product alone"
        )
    deltas, settings, configs = zip(*map(hf.read_adapter, folders), strict=True)
    for folder, cfg in zip(folders, configs, strict=True):
        for what, ours, first in (
            ("r", cfg.r, configs[0].r),
            ("scale of B A", lora.scale(cfg), lora.scale(configs[0])),
        ):
            if rule.space == "factor" and ours != first:
                raise aim_jax.InputError(
                    f"{folder}: {what} is {ours:g}, but {first:g} in {folders[0]};"
                    " --space product merges such"
                )
    fishers = _fishers(folders) if rule.name == "fisher" else None
    rank = rank or max(cfg.r for cfg in configs)
    scale = lora.scale(dataclasses.replace(configs[0], r=rank))
    # B takes up what its scale is beyond that of the result.
    more = [lora.scale(cfg) / scale for cfg in configs]
    deltas = [_times(d, m) for d, m in zip(deltas, more, strict=True)]
    if fishers:
        fishers = [_times(f, m**-2) for f, m in zip(fishers, more, strict=True)]
    merged = fusion.merge(
        deltas, rule, weights, fishers, rank, [str(f) for f in folders]
    )
    tensors = {
        _name(module, side): np.asarray(value)
        for module, sides in merged.items()
        for side, value in sides.items()
    }
    hf.write_adapter(out, tensors, settings[0] | {"r": rank, "inference_mode": True})


def _times(delta: dict[str, Any], more: float) -> dict[str, Any]:
    """An adapter with every B times `more`."""
    return {m: {"a": x["a"], "b": np.float32(more) * x["b"]} for m, x in delta.items()}


def _fishers(folders: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
    """The squared gradients beside each adapter."""
    fishers = []
    for folder in folders:
        found, _, _ = hf.read_adapter(folder, FISHER)
        for module, sides in found.items():
            for side, value in sides.items():
                if (value < 0).any():
                    raise aim_jax.InputError(
                        f"{folder / FISHER}: {_name(module, side)} has values below 0;"
                        " they must be mean squares"
                    )
        fishers.append(found)
    return fishers


def _name(module: str, side: str) -> str:
    return f"{module}.lora_{side.upper()}.weight"


def main(argv: Sequence[str]) -> None:
    """The command: absl's arguments in, a folder out."""
    values = flags.FLAGS

    def make(out: pathlib.Path) -> None:
        rule = fusion.Rule(
            values.method, **{field.name: values[field.name].value for field in FIELDS}
        )
        for field in FIELDS:
            rules = field.metadata["rules"] or fusion.RULES
            if values[field.name].present and rule.name not in rules:
                raise aim_jax.InputError(
                    f"--{field.name}: is for --method {' or '.join(rules)} alone"
                )
        fusion.check(rule)
        folders = [hf.snapshot(a, "adapter", hf.ADAPTER_FILES) for a in argv[1:]]
        weights = None
        if values.weights is not None:
            weights = [_number(text) for text in values.weights]
        fuse(folders, rule, out, weights, values.rank)

    export.command(argv[:1], ("method",), make)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise aim_jax.InputError(f"--weights: '{text}' is no number") from None


if __name__ == "__main__":
    flags.DEFINE_enum("method", None, fusion.RULES, "the rule")
    flags.DEFINE_string("out", None, "the folder to write")
    flags.DEFINE_list("weights", None, "one an adapter, A,B,...; default: all 1")
    flags.DEFINE_integer(
        "rank", None, "product space: rank of the result; default: the largest"
    )
    kinds = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer}
    kinds[str] = flags.DEFINE_string
    for field in FIELDS:
        define = kinds.get(type(field.default), flags.DEFINE_float)
        told = ", ".join(field.metadata["rules"]), field.metadata["text"]
        define(field.name, field.default, ": ".join(filter(None, told)))
    app.run(main)
