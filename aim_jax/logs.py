"""What a run leaves on disk line by line, and the progress bar."""

import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import tqdm

METRICS, MERGES = "metrics.jsonl", "merges.jsonl"


def append(file: pathlib.Path, row: dict[str, Any]) -> None:
    """Add one JSON line to `file`."""
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def cut(folder: pathlib.Path, task: int, step: int) -> None:
    """Drop the rows after `step` of `task`, which a resumed run writes again."""
    for file in (folder / METRICS, folder / MERGES):
        if file.is_file():
            lines = file.read_text().splitlines()
            kept = [line for line in lines if _place(line) <= (task, step)]
            write(file, "".join(line + "\n" for line in kept))


def write(file: pathlib.Path, text: str) -> None:
    """Write `file` whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    part.replace(file)


def write_rows(file: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def bar(total: int, done: int, show: bool) -> tqdm.tqdm:
    """A progress bar over `total` steps, on a terminal only."""
    return tqdm.tqdm(
        total=total,
        initial=done,
        disable=None if show else True,
        dynamic_ncols=True,
        unit="step",
    )


def show(bar: tqdm.tqdm, values: dict[str, float | None]) -> None:
    """Move `bar` on by a step and show the values that are not None."""
    shown = {k: f"{v:.4g}" for k, v in values.items() if v is not None}
    bar.set_postfix(shown, refresh=False)
    bar.update()


def _place(line: str) -> tuple[float, float]:
    # A line that a crash cut short is of the step that was running.
    try:
        row = json.loads(line)
        return row["task"], row["step"]
    except ValueError:
        return math.inf, math.inf
