"""The charts of runs: which one shows what."""

import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

from aim_jax import records, svg

WINDOW = 20  # steps of the running mean of the training loss


def of_run(run: records.Run) -> dict[str, str]:
    """File name -> SVG of every chart of `run` that has something to show.

    Tasks are numbered as in the names of the run's other folders, from 00.
    """
    found = {}
    if run.matrix:
        found["score_matrix"] = score_matrix(run.method, run)
        found["first_task"] = task_curve([(run.method, [run])], first=True)
        found["tasks_so_far"] = task_curve([(run.method, [run])], first=False)
    if any(t.steps for t in run.tasks):
        found["training_loss"] = training_loss(run)
    for task in run.tasks:
        name = f"{task.number - 1:02d}-" + re.sub(r"[^\w.-]", "_", task.name)
        for kind, drawing in of_task(task).items():
            found[f"{name}-{kind}"] = drawing
    return found


def of_task(task: records.Task) -> dict[str, str]:
    """Kind -> SVG of the signals, intervals and weights of one task."""
    charts = {
        "learning": _learning(task),
        "forgetting": _forgetting(task),
        "interval": _intervals(task),
        "weights": _weights(task),
    }
    return {kind: drawing for kind, drawing in charts.items() if drawing}


def score_matrix(title: str, run: records.Run) -> str:
    """Heat map of the score matrix, with the single-task scores below it."""
    below = ("single task", run.single) if run.single else None
    rows, note = run.names[: len(run.matrix)], "% on the column's task after the row's"
    return svg.heatmap(title, run.matrix, rows, run.names, note, below)


def task_curve(
    groups: Sequence[tuple[str, Sequence[records.Run]]],
    first: bool,
    quoted: Sequence[tuple[str, Sequence[float]]] = (),
) -> str:
    """Score on the first task, or the mean over the tasks so far, along one stream.

    groups: (label, runs); the runs of a group share colour and dash.
    quoted: (label, values in percent) of curves that no run here made.
    """
    names = groups[0][1][0].names
    series = []
    for i, (label, runs) in enumerate(groups):
        for k, run in enumerate(runs):
            seen = [row[: j + 1] for j, row in enumerate(run.matrix)]
            values = [row[0] if first else _mean(row) for row in seen]
            places = [j + 1 for j in range(len(values))]
            percent = [None if v is None else 100 * v for v in values]
            tips = [f"{label}, seed {run.seed}: {100 * (v or 0):.1f} %" for v in values]
            line = svg.Series(
                label if k == 0 else "", places, percent, i, dash=i % 2 > 0
            )
            series += [line, line._replace(label="", kind="dots", tips=tips)]
    for i, (label, values) in enumerate(quoted, len(groups)):
        places = range(1, len(values) + 1)
        series.append(svg.Series(label, places, values, i, dash=True, weight="thin"))
    room = int(400 / len(names) / svg.LETTER) - 1
    ticks = [
        (i + 1, svg.short(n, room) if room >= 8 else str(i + 1))
        for i, n in enumerate(names)
    ]
    title = f"Task 1, {names[0]}" if first else "Mean over the tasks so far"
    return svg.chart(title, series, "after training", "score in %", ticks=ticks)


def training_loss(run: records.Run) -> str:
    """Loss of every step of the stream, faint, and its running mean."""
    xs, raw, smooth, bounds, start = [], [], [], [], 0
    tasks = [t for t in run.tasks if t.steps]
    total = sum(t.steps[-1]["step"] for t in tasks)
    for task in tasks:
        losses = _column(task.steps, "loss")
        xs += [start + r["step"] for r in task.steps]
        raw += losses
        half = WINDOW // 2
        smooth += [
            _mean(losses[max(0, i - half) : i + half]) for i in range(len(losses))
        ]
        length = task.steps[-1]["step"]
        room = int(length / total * 890 / svg.LETTER) - 1
        name = svg.short(task.name, room) if room > 3 else ""
        bounds.append(svg.Mark(start, text=name, tip=f"{task.name} begins"))
        start += length
        xs, raw, smooth = [*xs, start], [*raw, None], [*smooth, None]
    series = [
        svg.Series("", xs, raw, weight="faint"),
        svg.Series("", xs, smooth),
    ]
    title = f"Training loss over the stream: each step, and the mean of {WINDOW} steps"
    size = (960, 260)
    return svg.chart(title, series, "step", "loss", marks=bounds, size=size)


def _learning(task: records.Task) -> str | None:
    movement = _column(task.steps, "movement")
    state = _column(task.merges, "learning")
    series, label, marks = [], "", _marks(task)
    if _some(movement):
        xs = [r["step"] for r in task.steps]
        series.append(svg.Series("movement a step", xs, movement))
    if series and _some(state):
        label = "state b at merges"
        xs, tips = [r["step"] for r in task.merges], [m.tip for m in marks]
        series.append(svg.Series(label, xs, state, 1, "dots", right=True, tips=tips))
    title = "Learning signal"
    if not series:
        return None
    return svg.chart(title, series, "step", "mean |change|", label, marks)


def _forgetting(task: records.Task) -> str | None:
    history = _column(task.steps, "history")
    xs, series = [r["step"] for r in task.steps], []
    if _some(history):
        # The row of a step that merged already tells of the interval that follows.
        merged = {r["step"]: r.get("threshold") for r in task.merges}
        limit = [merged.get(r["step"], r.get("threshold")) for r in task.steps]
        series.append(svg.Series("memory loss", xs, history))
        series.append(svg.Series("threshold", xs, limit, 1, weight="bold"))
    title = "Forgetting signal" if series else "Validation loss"
    if task.validations:
        xs, values = zip(
            *((r["step"], r["validation"]) for r in task.validations), strict=True
        )
        series.append(svg.Series("validation", xs, values, 2, "dots"))
    if not series:
        return None
    return svg.chart(title, series, "step", "loss", marks=_marks(task))


def _intervals(task: records.Task) -> str | None:
    names = ["interval", "rehearsal"]
    columns = [_column(task.merges, name) for name in names]
    return _staircase("Interval and rehearsal", "steps", names, columns, log=True)


def _weights(task: records.Task) -> str | None:
    rows = [r.get("weights") or [] for r in task.merges]
    width = max(map(len, rows), default=0)
    columns = [[w[i] if i < len(w) else None for w in rows] for i in range(width)]
    names = ["new (w_in)", "rehearsed (w_out)"] if width == 2 else []
    names += [f"weight {i + 1}" for i in range(len(names), width)]
    return _staircase("Fusion weights", "weight", names, columns)


def _staircase(
    title: str,
    unit: str,
    names: Sequence[str],
    columns: Sequence[list[float | None]],
    log: bool = False,
) -> str | None:
    """Chart of a level a merge for each of `columns`."""
    if not any(map(_some, columns)):
        return None
    count = range(1, len(columns[0]) + 1)
    series = [
        svg.Series(name, count, column, i, "step", dash=i % 2 > 0)
        for i, (name, column) in enumerate(zip(names, columns, strict=True))
        if _some(column)
    ]
    ticks = [(k, str(k)) for k in count[:: math.ceil(len(count) / 16)]]
    return svg.chart(title, series, "merge", unit, ticks=ticks, log=log)


def _marks(task: records.Task) -> list[svg.Mark]:
    marks = []
    for k, row in enumerate(task.merges, 1):
        shown = (
            "interval",
            "rehearsal",
            "flag",
            "weights",
            "learning",
            "next_interval",
        )
        values = (f"{f.replace('_', ' ')} {row[f]}" for f in shown if f in row)
        label = "forced merge" if row.get("forced") else "merge"
        tip = f"{label} {k} at step {row['step']}: {', '.join(values)}"
        marks.append(svg.Mark(row["step"], bool(row.get("forced")), label, tip=tip))
    return marks


def _column(rows: Sequence[records.Row], field: str) -> list[Any]:
    return [r.get(field) for r in rows]


def _some(values: Sequence[Any]) -> bool:
    return any(v is not None for v in values)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return statistics.fmean(known) if known else None
