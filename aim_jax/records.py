"""What a run folder holds, read back: the report and other readers start here."""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import aim_jax

Row = dict[str, Any]
PREDICTION = ("id", "input", "label", "prediction", "score")  # fields of such a row
DEPTH = 3  # of folders in which runs are looked for


class Task(NamedTuple):
    """What a run wrote about one task of its stream; `number` counts from 1.

    steps, validations, merges: rows of metrics.jsonl and merges.jsonl.
    predictions: rows of the last evaluation of the task.
    before: the score of each of them right after the task was learnt.
    """

    number: int
    name: str
    steps: list[Row]
    validations: list[Row]
    merges: list[Row]
    predictions: list[Row]
    before: list[float]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: `settings` is its config as `a.b` -> value, `date` that of its files."""

    path: pathlib.Path
    settings: dict[str, Any]
    results: dict[str, Any]
    names: list[str]
    tasks: list[Task]
    finished: bool
    date: str
    notes: list[str]

    @property
    def method(self) -> str:
        return self.results.get("method") or self.settings.get("method.name", "unknown")

    @property
    def seed(self) -> int | None:
        return self.results.get("seed", self.settings.get("train.seed"))

    @property
    def matrix(self) -> list[list[float | None]]:
        """Scores after each task so far (rows) on every task of the stream (columns)."""
        width = len(self.names)
        rows = self.results.get("matrix") or []
        return [(row + [None] * width)[:width] for row in rows[:width]]

    @property
    def single(self) -> list[float | None]:
        """Scores of the single-task runs, empty if there were none."""
        scores = self.results.get("single") or []
        return (scores + [None] * len(self.names))[: len(self.names)] if scores else []

    @property
    def figures(self) -> dict[str, float | None]:
        """What a run is judged by: scores in [0, 1], minutes and the rest of its cost.

        tokens_per_second: of the tasks' own batches, over all the time spent in training.
        token_passes: tokens trained on, each probed or written one as half: without weight
        gradients of the base a training step computes twice what a forward pass does.
        """
        seconds, work = (self.results.get(k) or {} for k in ("seconds", "work"))
        trained = work.get("train_tokens")
        figures = {k: self.results.get(k) for k in ("op", "fwt", "bwt")}
        figures["minutes"] = seconds["total"] / 60 if "total" in seconds else None
        figures["merges"] = sum(len(t.merges) for t in self.tasks)
        names = ("steps", "rehearsal_steps", "probes", "extra_bytes", "train_tokens")
        # A kind of work that never happened is not counted.
        figures |= {k: work.get(k, 0) if work else None for k in names}
        figures["tokens_per_second"] = figures["token_passes"] = None
        if trained and seconds.get("train"):
            figures["tokens_per_second"] = trained / seconds["train"]
        if trained:
            probed, written, *others = (
                work.get(f"{k}_tokens", 0)
                for k in ("probe", "synthesis", "rehearsal", "fisher")
            )
            figures["token_passes"] = trained + sum(others) + (probed + written) / 2
        return figures

    @property
    def stream(self) -> str:
        benchmark = self.settings.get("data.benchmark", "unknown benchmark")
        order = self.results.get("order", self.settings.get("data.order"))
        if self.settings.get("data.tasks"):
            order = None
        return benchmark if order is None else f"{benchmark}, order {order}"

    @property
    def progress(self) -> str:
        """`finished`, or how far the run has come."""
        begun = [t for t in self.tasks if t.steps]
        if self.finished or not begun:
            return "finished" if self.finished else "unfinished"
        task = begun[-1]
        count = f" of {len(self.names)}" if "tasks" in self.results else ""
        step = task.steps[-1]["step"]
        return f"unfinished: task {task.number}{count} ({task.name}), step {step}"


def find(folders: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """The run folders among `folders` and up to DEPTH below them, each once.

    A copy, which has the same config and results to the millisecond, is the same run:
    counted twice, one seed would be two.

    Raises InputError for a folder that is missing or leads to no run, and for no folder.
    """
    found: dict[Any, pathlib.Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise aim_jax.InputError(f"{folder}: no such folder; give that of a run")
        runs = _runs(folder, DEPTH)
        if not runs:
            raise aim_jax.InputError(
                f"{folder}: no run here; neither it nor a folder up to {DEPTH} below it has"
                " results.json or metrics.jsonl"
            )
        for run in runs:
            files = (run / "config.json", run / "results.json")
            copied = all(file.is_file() for file in files)
            same = tuple(f.read_bytes() for f in files) if copied else run.resolve()
            found.setdefault(same, run)
    if not found:
        raise aim_jax.InputError("no folder given; give one or more of runs")
    return list(found.values())


def _runs(folder: pathlib.Path, depth: int) -> list[pathlib.Path]:
    """The run folders in `folder`, itself included; a run holds no other."""
    if _is_run(folder):
        return [folder]
    inside = sorted(p for p in folder.iterdir() if p.is_dir()) if depth else []
    return [run for path in inside for run in _runs(path, depth - 1)]


def load(path: pathlib.Path) -> Run:
    """The run in folder `path`, finished or not.

    Raises InputError with file and line for what is not JSON or lacks a field. A last line
    without its end is left out of an unfinished run, with a note: it is being written.
    """
    settings = read_json(path / "config.json", {})
    results = read_json(path / "results.json", {})
    _check(results, _RESULTS, str(path / "results.json"))
    finished = bool(results.get("finished", results.get("op") is not None))
    notes = [] if results else ["there is no results.json yet"]
    logged = rows(path / "metrics.jsonl", ("task", "name", "step"), finished, notes)
    merges = rows(path / "merges.jsonl", ("task", "name", "step"), finished, notes)
    predictions = _predictions(path, finished, notes)
    settings = flatten(settings)
    names = list(results.get("tasks") or settings.get("data.tasks") or [])
    count = max([len(results.get("matrix") or []), *(r["task"] + 1 for r in logged)])
    names += [f"task {i + 1}" for i in range(len(names), count)]
    for row in logged:
        names[row["task"]] = row["name"]
    tasks = []
    for i, name in enumerate(names):
        own = [r for r in logged if r["task"] == i]
        steps = [r for r in own if "validation" not in r]
        checks = [r for r in own if "validation" in r]
        merged = [r for r in merges if r["task"] == i]
        scored = predictions.get(name, ([], []))
        tasks.append(Task(i + 1, name, steps, checks, merged, *scored))
    newest = max(p.stat().st_mtime for p in path.iterdir() if p.name in _MARKS)
    date = datetime.datetime.fromtimestamp(newest, datetime.UTC)
    return Run(
        path=path,
        settings=settings,
        results=results,
        names=names,
        tasks=tasks,
        finished=finished,
        date=f"{date:%Y-%m-%d %H:%M} UTC",
        notes=notes,
    )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`tree`, a dict of dicts, as one dict from dotted paths to values."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_scores(value: Any) -> bool:
    return isinstance(value, list) and all(v is None or _is_number(v) for v in value)


_Kind = tuple[str, Callable[[Any], bool]]
_NUMBER = "a number", _is_number
_MARKS = "results.json", "metrics.jsonl"
_FIELDS: dict[str, _Kind] = {
    **dict.fromkeys(("task", "step"), ("a whole number", _is_count)),
    **dict.fromkeys(("name", "input", "label", "prediction"), ("text", _is_text)),
    "weights": ("a list of numbers", _is_scores),
    **dict.fromkeys(
        ("loss", "movement", "history", "threshold", "validation"), _NUMBER
    ),
    **dict.fromkeys(("interval", "rehearsal", "next_interval", "flag"), _NUMBER),
    **dict.fromkeys(("learning", "score"), _NUMBER),
}
_RESULTS: dict[str, _Kind] = {
    "tasks": (
        "a list of names",
        lambda v: isinstance(v, list) and all(map(_is_text, v)),
    ),
    "matrix": (
        "a list of lists of scores",
        lambda v: isinstance(v, list) and all(map(_is_scores, v)),
    ),
    "single": ("a list of scores", _is_scores),
    "before_after": (
        "an object of objects of scores",
        lambda v: (
            isinstance(v, dict)
            and all(
                isinstance(x, dict) and _is_scores([*x.values()]) for x in v.values()
            )
        ),
    ),
    "metrics": ("a list of names", lambda v: isinstance(v, list)),
    **dict.fromkeys(
        ("seconds", "work"),
        (
            "an object of numbers",
            lambda v: isinstance(v, dict) and all(map(_is_number, v.values())),
        ),
    ),
    "rows": (
        "an object of objects",
        lambda v: isinstance(v, dict) and all(isinstance(x, dict) for x in v.values()),
    ),
    "versions": ("an object", lambda v: isinstance(v, dict)),
    **dict.fromkeys(("op", "bwt", "fwt"), _NUMBER),
}


def _is_run(path: pathlib.Path) -> bool:
    return any((path / name).is_file() for name in _MARKS)


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise aim_jax.InputError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise aim_jax.InputError(f"{file}: not UTF-8 at byte {error.start}") from None


def _parse(text: str, where: str) -> Row:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise aim_jax.InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise aim_jax.InputError(f"{where}: must be a JSON object, {{...}}")
    return value


def read_json(file: pathlib.Path, missing: Row | None = None) -> Row:
    """The object in a JSON file; `missing`, where given, if there is no such file.

    Raises InputError for one that holds none.
    """
    if missing is not None and not file.is_file():
        return missing
    return _parse(_text(file), str(file))


def _check(values: Row, kinds: dict[str, _Kind], where: str) -> None:
    """Raise InputError for a value that is there and of the wrong kind."""
    for field, (words, good) in kinds.items():
        if values.get(field) is not None and not good(values[field]):
            raise aim_jax.InputError(f"{where}: field '{field}' must be {words}")


def rows(
    file: pathlib.Path, need: tuple[str, ...], finished: bool, notes: list[str]
) -> list[Row]:
    """The rows of a JSON-lines file, which have the fields `need`; none without a file."""
    lines = _text(file).split("\n") if file.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            row = _parse(line, where)
        except aim_jax.InputError:
            if finished or number < len(lines):
                raise
            notes.append(f"the last line of {file.name} is cut off and left out")
            continue
        for field in need:
            if row.get(field) is None:
                raise aim_jax.InputError(f"{where}: field '{field}' is missing")
        _check(row, _FIELDS, where)
        found.append(row)
    return found


def numbered(folder: pathlib.Path, suffix: str = "") -> dict[str, pathlib.Path]:
    """TASK -> each NN-TASK in `folder`, in the order of the numbers, of any width.

    suffix: what the names of files end in beside that.
    """
    names = [(p, p.name.removesuffix(suffix)) for p in folder.glob(f"*-*{suffix}")]
    parts = [(p, *name.partition("-")) for p, name in names]
    found = [(int(n), task, p) for p, n, _, task in parts if n.isdecimal()]
    return {task: p for _, task, p in sorted(found)}


def _predictions(
    path: pathlib.Path, finished: bool, notes: list[str]
) -> dict[str, tuple[list[Row], list[float]]]:
    """Task name -> (rows of its last evaluation, their scores just after learning it)."""
    last: dict[str, pathlib.Path] = {}
    own: dict[str, pathlib.Path] = {}
    for task, stage in numbered(path / "predictions").items():
        for file in stage.glob("*.jsonl"):
            last[file.stem] = file
            if file.stem == task:
                own[file.stem] = file

    def read(file: pathlib.Path) -> list[Row]:
        return rows(file, PREDICTION, finished, notes)

    found = {}
    for name, file in last.items():
        now, then = read(file), read(own.get(name, file))
        if len(now) != len(then):
            then = now
        found[name] = now, [row["score"] for row in then]
    return found
