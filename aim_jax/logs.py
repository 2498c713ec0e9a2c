"""What a run leaves on disk line by line, and the progress bar."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import tqdm

METRICS, MERGES = "metrics.jsonl", "merges.jsonl"


def append(file: pathlib.Path, row: dict[str, Any]) -> None:
    """Add one JSON line to `file`."""
    with file.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def cut(folder: pathlib.Path, task: int) -> None:
    """Drop the rows of `task` and later ones, which a resumed run writes again."""
    for file in (folder / METRICS, folder / MERGES):
        if file.is_file():
            kept = [x for x in file.read_text().splitlines() if _task(x) < task]
            write(file, "".join(x + "\n" for x in kept))


def write(file: pathlib.Path, text: str) -> None:
    """Write `file` whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    part.replace(file)


def write_rows(file: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def bar(total: int, done: int, title: str, show: bool) -> tqdm.tqdm:
    """A progress bar over `total` steps, on a terminal only."""
    return tqdm.tqdm(
        total=total,
        initial=done,
        desc=title,
        disable=None if show else True,
        dynamic_ncols=True,
        unit="step",
    )


def _task(line: str) -> int:
    # A line that a crash cut short belongs to the task that was running.
    try:
        return json.loads(line)["task"]
    except ValueError:
        return 1 << 30
