"""What a run leaves on disk line by line, and the progress bar."""

import contextlib
import fcntl
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import tqdm

import aim_jax
from aim_jax import records

METRICS, MERGES = "metrics.jsonl", "merges.jsonl"
Board = Callable[..., None]
leads = True  # Of several processes one writes.


def append(file: pathlib.Path, row: dict[str, Any]) -> None:
    """Add one JSON line to `file`."""
    if not leads:
        return
    with writing(file), file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def cut(folder: pathlib.Path, task: int, step: int) -> None:
    """Drop the rows after `step` of `task`, which a resumed run writes again.

    And a last line that a crash cut short. Raises InputError for any other that is no row.
    """
    for file in (folder / METRICS, folder / MERGES):
        if file.is_file():
            found = records.rows(file, ("task", "step"), finished=False, notes=[])
            kept = [row for row in found if (row["task"], row["step"]) <= (task, step)]
            write(file, "".join(json.dumps(row) + "\n" for row in kept))


def write(file: pathlib.Path, text: str) -> None:
    """Write `file` whole or not at all."""
    if not leads:
        return
    # Of this process alone: runs side by side share the scores of single tasks.
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, "utf-8")
        part.replace(file)


@contextlib.contextmanager
def writing(target: pathlib.Path) -> Iterator[None]:
    """Turn what the system says about writing `target` into an InputError."""
    try:
        yield
    except OSError as error:
        raise aim_jax.InputError(
            f"{target}: cannot be written: {error.strerror}; what was saved before is"
            " whole: set this right, and the same command goes on from there"
        ) from error


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
    """Keep other runs out of `folder`, which is made unless it is there.

    Raises InputError if one is at work there.
    """
    if not leads:
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise aim_jax.InputError(
            f"--workdir {folder}: another process is at work on this run; wait for it"
        ) from None
    except OSError:
        pass  # Some network file systems lock no folder.
    try:
        yield
    finally:
        os.close(handle)


def write_rows(file: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def bar(total: int, done: int, show: bool) -> tqdm.tqdm:
    """A progress bar over `total` steps, on a terminal only."""
    return tqdm.tqdm(
        total=total,
        initial=done,
        disable=None if show and leads else True,
        dynamic_ncols=True,
        unit="step",
    )


def show(bar: tqdm.tqdm, values: dict[str, float | None]) -> None:
    """Move `bar` on by a step and show the values that are not None."""
    shown = {k: f"{v:.4g}" for k, v in values.items() if v is not None}
    bar.set_postfix(shown, refresh=False)
    bar.update()


def tensorboard() -> ModuleType:
    """The package that writes event files. Raises InputError if it is missing."""
    try:
        import tensorboardX
    except ImportError:
        raise aim_jax.InputError(
            "logs.tensorboard needs the package tensorboardX: pip install tensorboardX"
        ) from None
    return tensorboardX


@contextlib.contextmanager
def board(folder: pathlib.Path, wanted: bool, done: int = 0) -> Iterator[Board]:
    """A function that writes numbers to TensorBoard event files in `folder`, if `wanted`.

    write(first, group, step, values): the numbers of a dict, at step first + step of the
    stream. After `done` steps a resumed run hides what its predecessor wrote of later ones.
    """
    if not (wanted and leads):
        yield lambda first, group, step, values: None
        return
    package = tensorboard()
    protocol = package.proto.event_pb2
    # Not SummaryWriter: its thread dies of a full disk, and whoever feeds it waits forever.
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        writer = package.event_file_writer.EventsWriter(str(folder / "events"))

    def add(step: int, **content: Any) -> None:
        event = protocol.Event(wall_time=time.time(), step=step, **content)
        writer.write_event(event)

    def write(first: int, group: str, step: int, values: dict[str, Any]) -> None:
        with writing(folder):
            for name, value in values.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    summary = package.summary.scalar(f"{group}/{name}", value)
                    add(first + step, summary=summary)
            if "loss" not in values:  # not at every step
                writer.flush()

    if done:
        start = protocol.SessionLog(status=protocol.SessionLog.START)
        add(done + 1, session_log=start)
    try:
        yield write
    finally:
        with writing(folder):
            writer.close()
